"""The rows of a head divided over ranks; a rank that dies or hangs is a row that failed, in time."""

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from bench import ranks, report, sharded
from bench.cases import Shape
from bench.inputs import Unavailable
from bench.measure import CaseFailed, Row
from bench.record import timed
from bench.table import table
from bench.timing import TimeUp, limit

pytestmark = pytest.mark.xdist_group("sharded")  # one server of processes for all


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(sharded.SHAPES, "cpu", Shape(64, 32, 1001))


def test_ranks_and_one_process_are_measured_alike():
    began, threads = [], torch.get_num_threads()
    rows = sharded.measure_sharded("cpu", 2, begin=began.append)
    assert [(row.provider, row.status, len(row.seconds)) for row in rows] == [
        ("srft_kernels", "ok", 2),
        ("one process", "ok", 2),
    ], rows
    shared, alone = (row.extra for row in rows)
    common = {"peak_bytes", "peak_from", "ratio_to_products", "products_seconds", "tflops", "noisy", "note", "products"}
    assert common <= set(shared) and common <= set(alone) and shared["ranks"] == 2
    assert set(shared["errors"]) == set(alone["errors"]) >= {"loss", "logprobs", "entropy", "dx", "dW", "dW others"}
    assert 0 < shared["error"] < 1e-4
    # all of dx, and half of dW
    assert shared["returned_bytes"] == 4 * 32 * (64 + 501) and alone["returned_bytes"] == 4 * 32 * (64 + 1001)
    assert began == ["all providers", "srft_kernels", "one process", "all providers"]
    assert torch.get_num_threads() == threads
    assert "2 ranks over gloo with 1 thread each" in table(rows)
    page = "\n".join(
        report.table(str(rows[0].case), [timed(row)["extra_info"] | {"median": 1.0, "status": "ok"} for row in rows])
    )
    assert "| one process | 1,000.0 ms |" in page and "2 ranks over gloo" in page


def test_one_gpu_alone_measures_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Unavailable, match="two GPUs at least"):
        sharded.measure_sharded("cuda", 2)


# What goes wrong on a rank, in the place of bench.sharded's functions


def dies(*_) -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs(*_) -> None:
    time.sleep(600)


def raises(*_) -> None:
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("tried to allocate 60 GiB")
    dist.barrier()


def wrong(*asked) -> dict[str, torch.Tensor]:
    found = ranks_results(*asked)
    return found | {"dW": found["dW"] * (1 + 0.1 * dist.get_rank())}


ranks_results = sharded.results


@pytest.fixture
def measured(monkeypatch):
    """The rows of ranks and one process where a function fails on the ranks, which are started quickly here."""

    def measure(name: str, fails) -> list[Row]:
        monkeypatch.setattr(sharded, "Ranks", partial(ranks.Ranks, preload=("bench.sharded", __name__)))
        if fails is hangs:
            monkeypatch.setattr(sharded, "ANSWERING", 3.0)
        monkeypatch.setattr(sharded, name, fails)
        return sharded.measure_sharded("cpu", 2)

    return measure


@pytest.mark.parametrize(
    "name, fails, status, reason",
    [
        ("results", dies, "failed", "RuntimeError: rank 1: ended, exit status 3"),
        ("results", hangs, "failed", "RuntimeError: rank 0: no answer within 3 seconds"),
        ("results", raises, "failed", "RuntimeError: rank 1: OutOfMemoryError: tried to allocate 60 GiB"),
        ("results", wrong, "wrong", "error dW "),
        ("seconds", dies, "failed", "while it was timed: RuntimeError: rank 1: ended, exit status 3"),
    ],
)
def test_what_goes_wrong_on_a_rank_fails_the_ranks_alone(measured, name, fails, status, reason):
    started = time.perf_counter()
    shared, alone = measured(name, fails)
    assert shared.status == status and shared.reason.startswith(reason) and not shared.seconds
    assert alone.status == "ok" and len(alone.seconds) == 2
    assert time.perf_counter() - started < sharded.STARTING  # on a machine that may be busy


def test_ranks_that_cannot_start_fail_the_case(measured):
    with pytest.raises(CaseFailed, match="start of the ranks: RuntimeError: rank 1: ended, exit status 3"):
        measured("ready", dies)


def double(number: int) -> int:
    return number * (1 + dist.get_rank())


def test_after_a_failure_or_an_interruption_the_next_call_gets_its_own_answers():
    pair = ranks.Ranks(2, partial(sharded.settle, "cpu"), preload=("bench.sharded", __name__))
    try:
        assert pair(double, 3) == [3, 6]
        with pytest.raises(TimeUp), limit(1.0):
            pair(time.sleep, 3)
        assert pair(double, 4) == [4, 8]
        with pytest.raises(RuntimeError, match="rank 1: OutOfMemoryError"):
            pair(raises)
        assert pair(double, 5) == [5, 10]
    finally:
        pair.stop()
