"""Targets held against the JSON of a run that is made up: what is met, what is not, and what was not measured."""

import pytest
import torch

from bench import gpu, targets
from bench.cases import BUDGETED_TASK, FILTERED_TASK, Case, cases
from bench.measure import OURS_ALONE, description
from bench.providers import BUDGETED, FILTERED, OURS

ALL = cases("cuda")


def rows(case: Case, **changes) -> list[dict]:
    """A row of ours, one of eager's and those of our variants: 1 ms, of which the products take 0.95."""
    variants = {BUDGETED_TASK: BUDGETED.name, FILTERED_TASK: FILTERED.name}
    names = [OURS.name, "eager", *([variants[case.task]] if case.task in variants else [])]
    assert set(names) <= set(OURS_ALONE)
    known = description(case, torch.bfloat16) | {
        "ratio_to_products": 1 / 0.95,
        "products_seconds": 0.95e-3,
        "peak_bytes": 2**29 + 4 * case.shape.hidden * case.shape.vocab * (case.shape.tokens > 2000),
        "errors": {"dx": 1e-3, "dW": 2e-3},
    }
    times = {"eager": 1.2e-3, FILTERED.name: 0.5e-3, "frozen head": 0.6e-3}
    made = []
    for name in names:
        median = times.get(name) or times.get(case.task) or (0.1e-3 if case.live == 0.1 else 1e-3)
        info = known | {"provider": name} | changes
        made.append({"group": case.group, "extra_info": info, "stats": {"median": info.get("median", median)}})
    return made


def run(*more: dict) -> dict:
    """These rows instead of those of the same case and provider."""
    named = {(row["extra_info"]["case"], row["extra_info"]["provider"]): row
             for row in [row for case in ALL for row in rows(case)] + list(more)}  # fmt: skip
    return {"machine_info": {"kind": "cuda"}, "benchmarks": list(named.values()), "untimed": []}


def verdicts(result: dict) -> dict[str, str]:
    return {what: verdict for what, _, _, verdict in targets.evaluate(result)}


def test_the_cases_have_every_target_and_have_it_first():
    assert set(verdicts(run()).values()) == {"met"}
    first = next(i for i, case in enumerate(ALL) if case.group == "masked batches")
    begun = {"machine_info": {"kind": "cuda"}, "benchmarks": [row for case in ALL[:first] for row in rows(case)]}
    assert set(verdicts(begun).values()) == {"met"}


def test_without_rows_and_on_a_cpu_nothing_was_measured():
    for result in ({"benchmarks": []}, run() | {"machine_info": {"kind": "cpu"}}):
        assert set(verdicts(result).values()) == {"not measured"}


@pytest.mark.parametrize(
    "task, shape, live, provider, changes, target",
    [
        ("srft", targets.MAIN, 1.0, OURS.name, {"ratio_to_products": 1.1}, "SRFT in one pass, 8192×4096×151936"),
        ("scoring", targets.LARGE, 1.0, OURS.name, {"ratio_to_products": 1.1}, "scoring, 32768"),
        ("two pass", targets.QWEN2, 1.0, OURS.name, {"ratio_to_products": 1.2}, "two pass, 8192×3584"),
        ("frozen head", targets.MAIN, 1.0, OURS.name, {"median": 0.71e-3}, "frozen head"),
        ("cross entropy", targets.LARGE, 0.1, OURS.name, {"median": 0.14e-3}, "10 %"),
        (BUDGETED_TASK, targets.MAIN, 1.0, BUDGETED.name, {"median": 1.3e-3}, "256 MiB"),
        (
            FILTERED_TASK,
            targets.MAIN,
            1.0,
            FILTERED.name,
            {"median": 0.7e-3},
            "filtered backward, 8192×4096×151936: of",
        ),
        (FILTERED_TASK, targets.MAIN, 1.0, FILTERED.name, {"errors": {"dx": 0.02, "dW": 0}}, "filtered backward, 8192"),
        ("srft", targets.SMALL[1], 1.0, OURS.name, {"products_seconds": 0.8e-3}, "small call, 64×896"),
        ("srft", targets.LARGE, 1.0, OURS.name, {"peak_bytes": 6e9}, "workspace"),
        ("scoring", targets.MAIN, 1.0, "eager", {"median": 0.9e-3}, "the fastest peer"),
    ],
)
def test_each_target_can_be_missed(task, shape, live, provider, changes, target):
    case = next(c for c in ALL if (c.task, c.shape, c.live) == (task, shape, live))
    (row,) = (row for row in rows(case, **changes) if row["extra_info"]["provider"] == provider)
    missed = [what for what, verdict in verdicts(run(row)).items() if verdict == "NOT MET"]
    assert len(missed) == 1 and missed[0].startswith(target), missed


def test_a_verdict_on_a_noisy_row_says_so_and_who_was_faster_is_named():
    case = next(case for case in ALL if case.task == "scoring")
    (eager,) = (row for row in rows(case, noisy=True, median=0.8e-3) if row["extra_info"]["provider"] == "eager")
    found = targets.evaluate(run(eager))[-1]
    assert found[2:] == (f"0.80 (eager, {case})", "NOT MET, noisy")
    assert f"NOT MET, noisy  {found[0]}: ≥ 1.00; 0.80 (eager, {case})" in gpu.summary(run(eager)).splitlines()
