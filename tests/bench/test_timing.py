"""Turns, rotation, time limits, and what counts as noise."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from bench import timing
from bench.cases import Case, Shape
from bench.inputs import make


def test_a_slow_machine_is_no_noise_and_rounds_apart_are():
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 0.0)  # it slowed down for both
    assert timing.ratio([2.0, 2.0, 8.0, 8.0], [1.0] * 4)[1] > 0.5
    assert timing.ratio([1.0], [1.0])[1] == float("inf")


def test_of_few_rounds_each_counts_and_of_many_one_does_not():
    """Student's t: 4.3 standard errors of three rounds, 2.57 of six blocks."""
    assert timing.ratio([1.0, 1.0, 1.2], [1.0] * 3)[1] == pytest.approx(4.303 * 0.2 / 3, rel=1e-3)
    assert timing.ratio([*[1.0] * 17, 1.2], [1.0] * 18)[1] == 0


def test_slow_spells_are_noise_although_most_rounds_are_alike():
    """Six rounds of twenty in one spell hardly move a quartile; they make two of six blocks slow."""
    spell = [1.0] * 7 + [1.5] * 6 + [1.0] * 7
    scattered = [1.5 if i % 4 == 1 else 1.0 for i in range(20)]  # as many slow ones, but no spell
    assert timing.ratio(scattered, [1.0] * 20)[1] == 0 and timing.ratio(spell, [1.0] * 20)[1] > 0.2
    drifting = [1 + i / 50 for i in range(20)]
    assert timing.ratio(drifting, [1.0] * 20)[1] > timing.NOISE["cpu"]


def test_two_runs_differ_by_no_more_than_they_say():
    """On a machine whose spells last for some rounds: in 95 of 100 pairs, and the rounds' own spread would not do."""
    generator = torch.Generator().manual_seed(0)
    good = naive = 0
    for _ in range(400):
        noise = torch.randn(2, 36, generator=generator)
        for i in range(1, 36):
            noise[:, i] = 0.7 * noise[:, i - 1] + 0.3 * noise[:, i]
        runs = [(1 + 0.1 * run).tolist() for run in noise]
        (a, off_a), (b, off_b) = (timing.ratio(run, [1.0] * 36) for run in runs)
        good += abs(a - b) <= off_a * a + off_b * b
        naive += abs(a - b) <= sum(2 * torch.tensor(run).std().item() / 6 for run in runs)
    assert good >= 380 > naive


def test_a_stable_row_is_not_noisy_and_each_sign_alone_is():
    assert not timing.noise(0.07, 0.05, "cpu")["noisy"] and timing.noise(0.07, 0.05, "cuda")["noisy"]
    assert timing.noise(0.08, 0.0, "cpu")["noisy"] and timing.noise(0.0, 0.11, "cpu")["noisy"]
    assert not timing.noise(0.0, 0.5, "cuda")["noisy"]  # events on the device do not care for the host's processors


def test_other_processes_are_noticed():
    others = timing.Others()
    burn = "import time; end = time.time() + 0.6\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", burn])
    time.sleep(0.5)  # its time counts as ours only once it has been waited for
    assert not os.path.exists("/proc/stat") or others.share() > 0.5 / os.cpu_count() * 0.5
    child.wait()


def test_time_that_the_host_gave_to_others_counts(monkeypatch):
    stat = "cpu  100 0 50 900 0 0 0 {steal} 0 0\n"
    monkeypatch.setattr(timing.Path, "read_text", lambda self, **_: stat.format(steal=now))
    now = 0
    others = timing.Others()
    now = 50 * os.sysconf("SC_CLK_TCK")
    assert others.share() > 10  # 50 s in no time


@pytest.mark.parametrize(
    "device, expected",
    [("cpu", [("a", 0), ("b", 0), ("b", 1), ("a", 1)]), ("cuda", [("a", 0), ("b", 1), ("b", 2), ("a", 0)])],
)
def test_calls_take_turns_and_copies_take_theirs(device, expected):
    order = []
    calls = {name: lambda given, name=name: order.append((name, given)) for name in "ab"}

    def clock(call, device):
        call()
        return 1.0

    times, failed = timing.take_turns(calls, [0, 1, 2], device, rounds=2, clock=clock)
    assert order == expected and not failed
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_short_rounds_go_on_and_long_ones_end_early(monkeypatch):
    """On CPUs nine rounds at least, for three seconds at least; three once five seconds have passed."""
    for each, rounds in ((0.1, 30), (0.5, 9), (2.5, 3)):
        now = [0.0]
        monkeypatch.setattr(timing.time, "perf_counter", lambda now=now: now[0])

        def clock(call, device, now=now, each=each):
            now[0] += each
            return each

        times, _ = timing.take_turns({"a": lambda given: None}, [0], "cpu", clock=clock)
        assert abs(len(times["a"]) - rounds) <= 1  # tenths of seconds add up to 3, or almost


def test_copies_pass_the_cache_twice(monkeypatch):
    inputs = make(Case("", "scoring", Shape(64, 16, 128)), "cpu", torch.float32)
    of_cpu = timing.rotation(inputs, "cpu")
    assert of_cpu[0] is inputs and len({one.weight.data_ptr() for one in of_cpu}) == 1 + timing.COPIES
    for cache, copies in ((inputs.bytes, 3), (inputs.bytes // 100, 2), (inputs.bytes * 3 // 4, 3)):
        properties = type("Properties", (), {"L2_cache_size": cache})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        made = timing.rotation(inputs, "cuda")
        assert len(made) == copies and len({one.weight.data_ptr() for one in made}) == copies
        assert (len(made) - 1) * inputs.bytes >= 2 * cache


def test_one_that_fails_in_its_turn_is_out_and_the_others_go_on():
    def second(given):
        ran.append(given)
        if len(ran) == 2:
            raise torch.OutOfMemoryError("out of memory")

    ran = []
    times, failed = timing.take_turns({"a": lambda _: None, "b": second}, [0], "cpu", rounds=4)
    assert failed == {"b": "OutOfMemoryError: out of memory"} and len(ran) == 2
    assert list(times) == ["a"] and len(times["a"]) == 4


def test_a_lost_context_is_told_from_an_error(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timing.check_context("cuda", "QuACK", RuntimeError("something else"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    timing.check_context("cpu", "QuACK", RuntimeError("something else"))
    with pytest.raises(timing.ContextLost, match="QuACK: RuntimeError: illegal") as error:
        timing.check_context("cuda", "QuACK", RuntimeError("illegal"))
    assert error.value.provider == "QuACK"


def test_a_limit_ends_what_would_not_and_leaves_nothing_behind():
    def stubborn():
        while True:
            try:
                time.sleep(5)
            except Exception:
                continue

    started = time.perf_counter()
    with pytest.raises(timing.TimeUp, match=r"more than 0.2 s"), timing.limit(0.2):
        stubborn()
    with timing.limit(0.05):
        pass
    time.sleep(0.1)  # no alarm is left
    assert time.perf_counter() - started < 3


def test_a_limit_in_another_thread_is_none():
    def work():
        with timing.limit(0.01):
            time.sleep(0.1)
            done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_hot_is_the_second_of_two_calls():
    ran = []
    assert timing.hot_seconds(ran.append, "inputs", "cpu", rounds=3) > 0
    assert ran == ["inputs"] * 4
