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


def test_few_rounds_are_judged_by_their_ends():
    """Quartiles of three rounds leave out half of what the outer two say."""
    assert timing.ratio([1.0, 1.0, 1.2], [1.0] * 3)[1] == pytest.approx(0.2)
    assert timing.ratio([*[1.0] * 6, 1.2], [1.0] * 7)[1] == pytest.approx(0.2)
    assert timing.ratio([*[1.0] * 7, 1.2], [1.0] * 8)[1] == 0  # one round of eight may be hit


def test_a_drift_is_noise_although_quartiles_are_close():
    drifting = [1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.2, 1.2, 1.2]
    assert timing.ratio(drifting, [1.0] * 9)[1] == pytest.approx(0.2 / 1.1)
    jumping = [1.0, 1.2, 1.1, 1.1, 1.1, 1.1, 1.1, 1.0, 1.2]  # about the same values, no trend
    assert timing.ratio(jumping, [1.0] * 9)[1] == 0


def test_a_stable_row_is_not_noisy_and_each_sign_alone_is():
    assert not timing.noise(0.09, 0.05, "cpu")["noisy"] and timing.noise(0.09, 0.05, "cuda")["noisy"]
    assert timing.noise(0.11, 0.0, "cpu")["noisy"] and timing.noise(0.0, 0.11, "cpu")["noisy"]
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

    times, failed = timing.take_turns(calls, [0, 1, 2], device, rounds=2, most=10, clock=clock)
    assert order == expected and not failed
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


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
    times, failed = timing.take_turns({"a": lambda _: None, "b": second}, [0], "cpu", rounds=4, most=10)
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
