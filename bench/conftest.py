"""`pytest bench/ --benchmark`: timings are asked for; without the flag the same code runs once, as a check."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="time what bench/ runs (default: run each once)")


def pytest_configure(config):
    torch.manual_seed(0)
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
    else:
        config.option.benchmark_columns = ["median", "min", "stddev", "rounds"]


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark's own tables leave out: each median against the bare matrix products around it."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row for row in session.benchmarks if row.extra_info] if session else []
    if rows:
        terminalreporter.write_line(f"\n{'group':<20} {'what':<28} {'median s':>9} {'× products':>11} {'TFLOP/s':>8}")
    for row in sorted(rows, key=lambda row: row.group):
        extra = row.extra_info
        name = row.name.partition("[")[2].removesuffix("]").removeprefix(f"{row.group}-")
        numbers = f"{row.stats.median:>9.3f} {extra['ratio_to_products']:>11.2f} {extra['tflops']:>8.3f}"
        terminalreporter.write_line(f"{row.group:<20} {name:<28} {numbers}")


@pytest.fixture(autouse=True)
def quiet_machine():
    """Two threads on a CPU, as the figures in the README say."""
    if not torch.cuda.is_available():
        torch.set_num_threads(2)
