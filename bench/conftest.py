"""`pytest bench/ --benchmark`: timings are asked for; without the flag the same code runs once, as a check.

    --device cuda|cpu     default: what there is
    --budget SECONDS      nothing is begun later than this (default 270); what is left out is listed as skipped
    --group TEXT          only groups whose name has TEXT in it
    --record FILE         go on with the run in this file (record.py): measure the cases that are not in it

The JSON goes to .benchmarks/latest.json, or where --benchmark-json says; it is there after every case. Whether two of
them agree: `python -m bench.agreement A.json B.json`.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch

from .cases import Case
from .environment import ROOT, environment
from .groups import OWN, check_group, every_case
from .inputs import Unavailable
from .measure import EVERYONE, OURS_ALONE, CaseFailed, Limits, Row, everyone, measure, release
from .providers import Provider
from .record import Record, finite
from .table import table
from .timing import LOST, ContextLost, kind_of, told

EACH = {"cuda": 30.0, "cpu": 15.0}  # seconds: see measure.Limits
TOTAL = {"cuda": 75.0, "cpu": 150.0}


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="time what bench/ runs (default: run each once)")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.addoption("--budget", type=float, default=270.0, help="seconds after which nothing is begun")
    parser.addoption("--group", default="", help="only groups with this in their name")
    parser.addoption("--record", type=Path, help="go on with the run in this file")


def pytest_configure(config):
    config._bench_began = time.perf_counter()
    try:
        check_group(config.getoption("--group"), config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    torch.manual_seed(0)
    if not config.getoption("--device").startswith("cuda"):
        torch.set_num_threads(min(2, torch.get_num_threads()))  # what the figures in the documentation say
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
        return
    config.option.benchmark_quiet = True  # one table per case, below, instead of one per statistic
    if not config.option.benchmark_json and not config.option.record:
        config.option.benchmark_json = ROOT / ".benchmarks" / "latest.json"
    if config.option.benchmark_json:
        Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


class Bench:
    """Rows of the cases measured so far. A case is measured, once, when its first row is asked for."""

    def __init__(self, config):
        self.device = config.getoption("--device")
        self.rounds = None if config.getoption("--benchmark") else 1
        kind = kind_of(self.device)
        self.began = config._bench_began
        self.limits = Limits(self.began + config.getoption("--budget"), EACH[kind], TOTAL[kind])
        self.record = record_of(config)
        self.left_out = left_out = self.record.left_out if self.record else {}
        self.providers = [lost(p.name, left_out[p.name]) if p.name in left_out else p for p in everyone()]
        self.before = self.record.done if self.record else set()
        self.measured: dict[Case, dict[str, Row]] = {}
        self.say = lambda line: None

    def row(self, case: Case, provider: str) -> Row | None:
        """None: a task that this provider does not do."""
        if case not in self.measured:
            rows = self._measure(case)
            if self.record:
                self.record.add(rows)
            self.measured[case] = {row.provider: row for row in rows}
            if any(row.status != "skipped" for row in rows):
                self.say(f"{time.perf_counter() - self.began:5.0f} s  {case}")
        rows = self.measured[case]
        return rows.get(EVERYONE) or rows.get(provider)

    def _measure(self, case: Case) -> list[Row]:
        def begin(who: str) -> None:
            if self.record:
                self.record.begin(case, who)

        if time.perf_counter() > self.limits.deadline:
            return [Row(case, EVERYONE, "skipped", "no time left")]
        if len(self.measured) < 2:
            # modules, then what the first case has compiled: every collection between providers would walk through
            # them (a tenth of a second). Not before every case: what is frozen is never collected
            gc.collect()
            gc.freeze()
        try:
            if own := OWN.get(case.group):
                return own.measure(self.device, self.rounds, self.limits, begin, self.left_out)
            return measure(case, self.providers, self.device, self.rounds, self.limits, begin)
        except Unavailable as error:
            row = Row(case, EVERYONE, "skipped", str(error))
        except CaseFailed as error:
            row = Row(case, EVERYONE, "failed", str(error))
        except ContextLost as error:
            known = [p.name for p in self.providers] + [name for group in OWN.values() for name in group.providers]
            begin(error.provider if error.provider in known else f"{EVERYONE}, {error.provider}")
            if self.record:
                self.record.blame(error.reason)
            pytest.exit(f"the CUDA context is lost: {error}", returncode=LOST)
        except Exception as error:
            row = Row(case, EVERYONE, "failed", told(error))
        release(self.device)
        return [row]

    def rows(self) -> list[Row]:
        return [row for rows in self.measured.values() for row in rows.values()]


class LeftOut(Exception):
    """A provider took the process down, or hung, in a case before."""


def lost(name: str, reason: str) -> Provider:
    """Stands for a provider that is left out."""

    def load(device: str):
        raise LeftOut(reason)

    return Provider(name, load)


def record_of(config) -> Record | None:
    if not config.getoption("--benchmark"):
        return None
    resumed = config.getoption("--record")
    record = Record(resumed or Path(config.option.benchmark_json), resume=bool(resumed))
    if not resumed:
        about = environment(config.getoption("--device"), command_of(config))
        record.write(machine_info=about, commit_info={"id": about["commit"]})
    return record


@pytest.fixture(scope="session")
def bench(request) -> Bench:
    made = bench_of(request.config)
    reporter, capture = map(request.config.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))

    def say(line: str) -> None:  # after a minute of dots one wants to know where it is
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    if request.config.getoption("--benchmark") and reporter and capture:
        made.say = say
    return made


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
    chosen = [(case, name) for case in every_case(device) for name in names_of(case, names)]
    chosen = [(case, name) for case, name in chosen if group in case.group]
    metafunc.parametrize("case, provider", chosen, ids=[f"{case}-{name}" for case, name in chosen])


def names_of(case: Case, names: list[str]) -> list[str]:
    if own := OWN.get(case.group):
        return list(own.providers)
    return [name for name in names if name in OURS_ALONE] if case.ours else names


def pytest_benchmark_generate_machine_info(config):
    return environment(config.getoption("--device"), command_of(config))


def pytest_benchmark_generate_commit_info(config):
    return {"id": environment(config.getoption("--device"), "")["commit"]}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What pytest-benchmark knows nothing of: rows without a time, and why; how long everything took."""
    record = bench_of(config).record
    ours = ("untimed", "left_out", "started", "seconds")
    output_json |= finite({**output_json, **{key: record.data[key] for key in ours if key in record.data}})


def command_of(config) -> str:
    arguments = [str(a) for a in config.invocation_params.args if not str(a).startswith("--benchmark-json")]
    return " ".join(["pytest", *arguments])


def pytest_terminal_summary(terminalreporter, config):
    if not hasattr(config, "_bench") or not config._bench.rows():
        return
    rows = config._bench.rows()
    left_out = [row for row in rows if row.provider == EVERYONE and row.status == "skipped"]
    terminalreporter.write_line(table(row for row in rows if row not in left_out))
    for reason in dict.fromkeys(row.reason for row in left_out):
        terminalreporter.write_line(f"\nskipped, {reason}:")
        for row in left_out:
            if row.reason == reason:
                terminalreporter.write_line(f"  {row.case}")
    if config.getoption("--benchmark"):
        record = config._bench.record
        terminalreporter.write_line(f"\n{record.data['seconds']:.0f} s; every round, as JSON: {record.path}")
