"""pytest bench/ --benchmark: a row per case and provider, its evidence in extra_info. See cases.py for the groups.

Each case is measured as a whole, all providers in turns (measure.py); pytest-benchmark is then told the durations.
"""

import pytest

from .peers import Changed
from .providers import OUR_NAMES
from .record import finite
from .timing import Replay

clock = Replay()


@pytest.mark.benchmark(timer=clock)
def test_case(benchmark, bench, case, provider):
    if str(case) in bench.before:
        benchmark.disabled = True
        pytest.skip("measured before")
    row = bench.row(case, provider)
    if row is None:
        benchmark.disabled = True
        pytest.skip(f"{provider} does not do this: {case.task}")
    if row.status != "ok":
        told = f"{row.status}: {row.reason}"
        ours = provider in OUR_NAMES and row.status in ("wrong", "failed")
        assert not ours and Changed.__name__ not in row.reason, told
        pytest.skip(told)
    durations = iter(row.seconds)
    benchmark.group = case.group
    benchmark.extra_info |= finite({"provider": provider, **row.extra})
    benchmark.pedantic(lambda: clock.advance(next(durations)), rounds=len(row.seconds))
