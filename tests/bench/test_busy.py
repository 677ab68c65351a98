"""Calls beside busy programs: measured in processes of their own, whose threads wait as they are told."""

import subprocess

import pytest

from bench import busy, report
from bench.cases import Shape
from bench.inputs import Unavailable
from bench.record import timed
from bench.table import table


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(busy, "SHAPE", Shape(64, 32, 1001))


def test_each_way_to_wait_is_measured_with_its_products():
    began = []
    rows = busy.measure_busy("cpu", 2, begin=began.append)
    assert [(row.provider, row.status, len(row.seconds)) for row in rows] == [
        ("srft_kernels", "ok", 2),
        ("srft_kernels, short waits", "ok", 2),
    ], rows
    assert all(row.extra["ratio_to_products"] > 0 for row in rows)
    assert began == ["srft_kernels", "srft_kernels, short waits", "all providers"]
    assert "GOMP_SPINCOUNT=10000" in table(rows)
    extra = [timed(row)["extra_info"] | {"median": 1.0, "status": "ok"} for row in rows]
    assert {row["case"] for row in extra} == {str(rows[0].case)}
    assert "| srft_kernels, short waits | 1,000.0 ms |" in "\n".join(report.table(str(rows[0].case), extra))


def test_the_variable_reaches_the_process_and_an_older_one_does_not(monkeypatch):
    seen = []

    def run(command, env, **options):
        seen.append({name: env.get(name) for name in busy.WAITS})
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(busy.subprocess, "run", run)
    for environment in busy.NAMES.values():
        busy.in_its_own_process(environment, 1)
    assert [values["GOMP_SPINCOUNT"] for values in seen] == [None, "10000"]
    assert {values["OMP_WAIT_POLICY"] for values in seen} == {None}


def test_a_process_that_fails_is_a_row_that_failed(monkeypatch):
    monkeypatch.setattr(busy, "SHAPE", Shape(64, -1, 1001))
    rows = busy.measure_busy("cpu", 2)
    assert {row.status for row in rows} == {"failed"}


def test_not_on_a_gpu():
    with pytest.raises(Unavailable):
        busy.measure_busy("cuda", 2)
