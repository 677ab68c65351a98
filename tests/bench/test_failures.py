"""Whatever goes wrong is a row that says so: a provider's failure its own, a case's failure one for all, once."""

import gc
import time
import types
import weakref
from pathlib import Path

import pytest
import torch

from bench import conftest, measure, timing
from bench.cases import Case, Shape
from bench.inputs import Unavailable
from bench.measure import EVERYONE, CaseFailed, Limits, Row
from bench.providers import OURS, Abilities, Provider
from bench.record import Record

CASE = Case("scoring", "scoring", Shape(64, 16, 128))
RIGHT = OURS.load("cpu").statistics


def provider(name, statistics) -> Provider:
    return Provider(name, lambda device: Abilities(statistics=statistics))


def out_of_memory(x, weight, target):
    raise torch.OutOfMemoryError("tried to allocate 300 GiB")


def hanging(x, weight, target):
    time.sleep(60)


def later(x, weight, target, calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) == 4:  # error and peak come before the rounds
        raise RuntimeError("out of luck")
    return RIGHT(x, weight, target)


def test_each_failure_is_a_row_of_its_own_and_the_others_are_measured():
    strange = [provider("greedy", out_of_memory), provider("hanging", hanging), provider("later", later)]
    began = []
    rows = {
        row.provider: row
        for row in measure.measure(CASE, [*strange, OURS], "cpu", 3, Limits(each=2), lambda who: began.append(who))
    }
    assert rows[OURS.name].status == "ok" and len(rows[OURS.name].seconds) == 3
    told = {name: (row.status, row.reason) for name, row in rows.items() if name != OURS.name}
    assert told == {
        "greedy": ("failed", "OutOfMemoryError: tried to allocate 300 GiB"),
        "hanging": ("skipped", "more than 2 s"),
        "later": ("failed", "while it was timed: RuntimeError: out of luck"),
    }
    assert not rows["later"].seconds and "tflops" not in rows["later"].extra
    assert began == [EVERYONE, "greedy", "hanging", "later", OURS.name, EVERYONE]


def test_ours_that_hangs_has_failed():
    (row,) = measure.measure(CASE, [provider(OURS.name, hanging)], "cpu", 1, Limits(each=0.2))
    assert (row.status, row.reason) == ("failed", "more than 0.2 s")


def test_who_has_had_its_time_is_skipped_and_so_is_who_comes_too_late():
    peer, limits = provider("peer", RIGHT), Limits(total=10.0)
    limits.spent["peer"] = limits.spent[OURS.name] = 11.0
    rows = {row.provider: row for row in measure.measure(CASE, [OURS, peer], "cpu", 1, limits)}
    assert rows[OURS.name].status == "ok"
    assert (rows["peer"].status, rows["peer"].reason) == ("skipped", "has had its 10 s in the cases before")
    late = Limits(deadline=time.perf_counter())
    rows = measure.measure(CASE, [OURS, peer], "cpu", 1, late)
    assert {(row.status, row.reason) for row in rows} == {("skipped", "no time left")}


def test_a_call_too_slow_for_three_rounds_is_not_timed():
    def slow(x, weight, target):
        time.sleep(2)
        return RIGHT(x, weight, target)

    (row,) = measure.measure(CASE, [provider("slow", slow)], "cpu", 3, Limits(each=5.5))
    assert row.status == "skipped" and "three rounds would be past 5.5 s" in row.reason and not row.seconds


@pytest.mark.parametrize("name, told", [("make", "inputs"), ("truth", "truth in fp64"), ("bare_products", "products")])
def test_what_every_provider_needs_fails_the_case(monkeypatch, name, told):
    def broken(*_):
        raise torch.OutOfMemoryError("tried to allocate 300 GiB")

    monkeypatch.setattr(measure, name, broken)
    with pytest.raises(CaseFailed, match=f"{told}.*OutOfMemoryError: tried to allocate 300 GiB"):
        measure.measure(CASE, [OURS], "cpu", 1)


def test_buffers_kept_around_the_allocator_count_in_the_peak():
    for device, outside, source in (
        ("cpu", 0, "process"),
        ("cuda", 0, "allocator"),
        ("cuda", 7, "allocator and driver"),
    ):
        found = {"peak_bytes": 5 + outside, "peak_from": source, "outside_bytes": outside}
        assert measure.peaks(5, outside, device) == found


def test_a_heap_made_once_counts_in_every_case_and_code_in_none(monkeypatch):
    """The first case sees it being made; the second finds it there."""
    heap, code, kept = 2**30, 20 * 2**20, []

    def with_heap(x, weight, target):
        kept.append(True)
        return RIGHT(x, weight, target)

    monkeypatch.setattr(measure.memory, "outside_bytes", lambda device: 2**29 + heap * bool(kept) + code * len(kept))
    monkeypatch.setattr(measure, "OUTSIDE", measure.Counter())
    held = {OURS.name: 0, "heap": heap + code}  # in one go with the code
    for _ in range(2):
        rows = measure.measure(CASE, [OURS, provider("heap", with_heap)], "cpu", 1)
        assert dict(measure.OUTSIDE) == held == {row.provider: row.extra["outside_bytes"] for row in rows}


@pytest.fixture
def bench(tmp_path):
    """The session's state as `pytest bench/ --benchmark` has it, on a file of its own."""

    def made(*providers: Provider, resume: bool = False, budget: float = 60) -> conftest.Bench:
        options = {"--device": "cpu", "--benchmark": True, "--budget": budget, "--record": tmp_path / "run.json"}
        if not resume:
            (tmp_path / "run.json").unlink(missing_ok=True)
        config = types.SimpleNamespace(
            getoption=options.__getitem__, option=types.SimpleNamespace(), _bench_began=time.perf_counter()
        )
        found = conftest.Bench(config)
        found.rounds = 2
        left_out = found.record.left_out
        found.providers = [conftest.lost(p.name, left_out[p.name]) if p.name in left_out else p for p in providers]
        return found

    return made


def test_a_failed_case_is_one_row_and_not_tried_again(bench, monkeypatch):
    def broken(*_):
        tried.append(1)
        raise ZeroDivisionError("by zero")

    tried = []
    monkeypatch.setattr(conftest, "measure", broken)
    session = bench(OURS, provider("peer", RIGHT))
    rows = [session.row(CASE, name) for name in (OURS.name, "peer")]
    assert rows[0] is rows[1] and tried == [1]
    assert (rows[0].provider, rows[0].status, rows[0].reason) == (EVERYONE, "failed", "ZeroDivisionError: by zero")
    assert session.record.data["untimed"][0]["reason"] == "ZeroDivisionError: by zero"


def test_inputs_that_are_not_there_and_time_that_is_over_are_skipped(bench, monkeypatch):
    def absent(*_):
        raise Unavailable("no weights here")

    monkeypatch.setattr(conftest, "measure", absent)
    assert bench(OURS).row(CASE, OURS.name).reason == "no weights here"
    row = bench(OURS, budget=-1).row(CASE, OURS.name)
    assert (row.status, row.reason) == ("skipped", "no time left")


def test_what_a_case_has_made_can_be_collected(bench, monkeypatch):
    """Frozen before the next one it would never be."""

    class Model:
        def __init__(self):
            self.itself = self

    def measured(case, *_):
        made.append(Model())
        return [Row(case, OURS.name, "skipped")]

    made = []
    monkeypatch.setattr(conftest, "measure", measured)
    session = bench(OURS)
    for tokens in (8, 16, 32, 64):
        session.row(Case("scoring", "scoring", Shape(tokens, 16, 128)), OURS.name)
    seen = weakref.ref(made[2])  # a later case's: while the first ones begin, modules and compiled code are frozen
    made.clear()
    gc.collect()
    assert seen() is None


def test_after_every_case_the_file_has_it_and_a_new_process_goes_on(bench, tmp_path):
    session = bench(OURS)
    session.row(CASE, OURS.name)
    other = Case("scoring", "scoring", Shape(32, 16, 128))
    session.record.begin(other, "peer")  # and here it is killed
    found = Record(tmp_path / "run.json", resume=True)
    assert [row["extra_info"]["provider"] for row in found.data["benchmarks"]] == [OURS.name]
    assert found.done == {str(CASE)} and found.running["case"] == str(other) and found.data["seconds"] >= 0
    assert found.blame("died") == "peer" and found.running is None
    session = bench(OURS, provider("peer", RIGHT), resume=True)
    assert session.before == {str(CASE)}
    row = session.row(other, "peer")
    assert row.status == "failed" and f"died, in {other}" in row.reason
    assert session.row(other, OURS.name).status == "ok" and not list(Path(tmp_path).glob("*.part"))


def test_a_lost_context_ends_the_process_and_leaves_its_culprit_out(bench, monkeypatch):
    def illegal(x, weight, target):
        raise RuntimeError("an illegal memory access was encountered")

    def check(device, name, error):
        raise timing.ContextLost(name, timing.told(error))

    session = bench(OURS, provider("peer", illegal))
    with monkeypatch.context() as lost, pytest.raises(pytest.exit.Exception, match="context is lost: peer") as left:
        lost.setattr(timing, "check_context", check)
        session.row(CASE, OURS.name)
    assert left.value.returncode == timing.LOST
    session = bench(OURS, provider("peer", illegal), resume=True)
    assert "illegal memory access" in session.record.left_out["peer"] and not session.before
    assert session.row(CASE, "peer").status == "failed" and session.row(CASE, OURS.name).status == "ok"


def test_a_context_lost_by_what_all_need_fails_the_case(bench, monkeypatch):
    def lost(*_):
        raise timing.ContextLost("bare products", "RuntimeError: illegal")

    monkeypatch.setattr(conftest, "measure", lost)
    session = bench(OURS)
    with pytest.raises(pytest.exit.Exception):
        session.row(CASE, OURS.name)
    record = bench(OURS, resume=True).record
    assert record.done == {str(CASE)} and not record.left_out
    assert record.data["untimed"][0]["reason"] == "all providers, bare products: RuntimeError: illegal"


def test_ours_that_takes_the_process_down_fails_its_case_only(bench):
    record = bench().record
    record.begin(CASE, OURS.name)
    record.blame("died, exit status -11")
    assert record.done == {str(CASE)} and not record.left_out
    row = record.data["untimed"][0]
    assert (row["provider"], row["status"]) == (EVERYONE, "failed") and "srft_kernels: died" in row["reason"]
