"""Scores of generations: pass@k by hand."""

import math

import pytest

from srft.evaluation import Evaluation, pass_at_k, scores_of
from srft.tables import aligned


def generation(*rewards: float | None) -> dict:
    return {"rewards": list(rewards), "finished": [True] * len(rewards), "tokens": [1] * len(rewards)}


def test_pass_at_k_by_hand():
    """Of 5 samples 2 are right: 3 of the 10 pairs hold none, and 1 of the 10 triples. Of 5 with 1: 6 and 4 of 10."""
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10) and pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    found = scores_of([generation(1, 0, 1, 0, 0), generation(0, 0, 0, 0, 1), generation(0, 0, 0, 0, 0)], samples=5)
    assert found.pass_at == pytest.approx({1: 3 / 15, 2: (7 / 10 + 4 / 10) / 3, 4: (1 + 4 / 5) / 3, 5: 2 / 3})


def test_an_evaluation_comes_back_from_its_line():
    found = scores_of([generation(1, 0), generation(0, None)], samples=2)
    evaluation = Evaluation(**vars(found), samples=2, seed=5, tasks={"t": found})
    row = {**evaluation.as_dict(), "step": 3}
    row["pass_at"] = {str(k): value for k, value in row["pass_at"].items()}
    assert Evaluation.of(row) == evaluation
    for older in (row, row["tasks"]["t"]):  # of a version without intervals
        del older["interval"], older["pass_intervals"]
    assert Evaluation.of(row).reward == evaluation.reward and math.isnan(Evaluation.of(row).interval[0])


def test_columns_are_aligned():
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc   d"]
