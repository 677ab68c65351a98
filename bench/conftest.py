"""`pytest bench/ --benchmark`: timings are asked for; without the flag the same code runs once, as a check.

    --device cuda|cpu     default: what there is
    --budget SECONDS      no case is begun later than this; those left out are listed as skipped
    --group TEXT          only groups whose name has TEXT in it

The JSON goes to .benchmarks/latest.json, or where --benchmark-json says.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from .cases import Case, cases
from .environment import ROOT, environment
from .inputs import Unavailable
from .measure import Row, everyone, measure
from .step import LOSSES, measure_step, step_case
from .table import table


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="time what bench/ runs (default: run each once)")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.addoption("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.addoption("--group", default="", help="only groups with this in their name")


def pytest_configure(config):
    torch.manual_seed(0)
    if not config.getoption("--device").startswith("cuda"):
        torch.set_num_threads(min(2, torch.get_num_threads()))  # what the figures in the documentation say
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
        return
    config.option.benchmark_quiet = True  # one table per case, below, instead of one per statistic
    if not config.option.benchmark_json:
        config.option.benchmark_json = ROOT / ".benchmarks" / "latest.json"
    Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


class Bench:
    """Rows of the cases measured so far. A case is measured when its first row is asked for."""

    def __init__(self, config):
        self.device = config.getoption("--device")
        self.rounds = None if config.getoption("--benchmark") else 1
        self.deadline = time.perf_counter() + config.getoption("--budget")
        self.providers = everyone()
        self.measured: dict[Case, dict[str, Row]] = {}

    def row(self, case: Case, provider: str) -> Row | None:
        """None: a task that this provider does not do."""
        if case not in self.measured:
            self.measured[case] = {row.provider: row for row in self._measure(case)}
        rows = self.measured[case]
        return rows.get("all providers") or rows.get(provider)

    def _measure(self, case: Case) -> list[Row]:
        if time.perf_counter() > self.deadline:
            return [Row(case, "all providers", "skipped", "no time left")]
        try:
            if case.group == "training step":
                return measure_step(self.device, self.rounds)
            return measure(case, self.providers, self.device, self.rounds)
        except Unavailable as error:
            return [Row(case, "all providers", "skipped", str(error))]

    def rows(self) -> list[Row]:
        return [row for rows in self.measured.values() for row in rows.values()]


@pytest.fixture(scope="session")
def bench(request) -> Bench:
    return bench_of(request.config)


def bench_of(config) -> Bench:
    if not hasattr(config, "_bench"):
        config._bench = Bench(config)
    return config._bench


def pytest_generate_tests(metafunc):
    """A test per case and provider that may have to do with it, whole cases together."""
    if "provider" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device, group = config.getoption("--device"), config.getoption("--group")
    names = [provider.name for provider in everyone()]
    chosen = [(case, name) for case in cases(device) for name in (names[:2] if case.ours else names)]
    chosen += [(step_case(device), name) for name in LOSSES]
    chosen = [(case, name) for case, name in chosen if group in case.group]
    metafunc.parametrize("case, provider", chosen, ids=[f"{case}-{name}" for case, name in chosen])


def pytest_benchmark_generate_machine_info(config):
    return environment(config.getoption("--device"), command_of(config))


def pytest_benchmark_generate_commit_info(config):
    return {"id": environment(config.getoption("--device"), "")["commit"]}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What pytest-benchmark knows nothing of: rows without a time, and why."""
    rows = bench_of(config).rows()
    output_json["untimed"] = [
        {"case": str(row.case), "group": row.case.group, "provider": row.provider} | describe(row)
        for row in rows
        if row.status != "ok"
    ]


def describe(row: Row) -> dict:
    return {"status": row.status, "reason": row.reason, "error": row.extra.get("error")}


def command_of(config) -> str:
    arguments = [str(a) for a in config.invocation_params.args if not str(a).startswith("--benchmark-json")]
    return " ".join(["pytest", *arguments])


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "_bench") and config._bench.rows():
        terminalreporter.write_line(table(config._bench.rows()))
        if config.getoption("--benchmark"):
            shown = config.option.benchmark_json
            terminalreporter.write_line(f"\nevery round, as JSON: {shown}")
