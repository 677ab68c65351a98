"""Scores of generations: pass@k by hand, and intervals that hold the truth as often as they say."""

import math

import numpy
import pytest

from srft.evaluation import Evaluation, aligned, interval_of, interval_of_mean, pass_at_k, scores_of


def generation(*rewards: float | None) -> dict:
    return {"rewards": list(rewards), "finished": [True] * len(rewards), "tokens": [1] * len(rewards)}


def test_pass_at_k_by_hand():
    """Of 5 samples 2 are right: 3 of the 10 pairs hold none, and 1 of the 10 triples. Of 5 with 1: 6 and 4 of 10."""
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10) and pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    found = scores_of([generation(1, 0, 1, 0, 0), generation(0, 0, 0, 0, 1), generation(0, 0, 0, 0, 0)], samples=5)
    assert found.pass_at == pytest.approx({1: 3 / 15, 2: (7 / 10 + 4 / 10) / 3, 4: (1 + 4 / 5) / 3, 5: 2 / 3})


def test_an_interval_by_hand():
    """Three right and one wrong, and one of each more: mean 2/3, variance 4/15; they are 4 · 2/9 · 15/4 = 10/3."""
    z, n, p = 1.959964, 10 / 3, 3 / 4
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    assert interval_of([1, 1, 0, 1]) == pytest.approx(expected, rel=1e-6)


def test_few_prompts_that_are_alike_are_not_sure():
    low, high = interval_of([0.0] * 30)
    assert low == 0 and 0.05 < high < 0.2
    low, high = interval_of([1.0] * 30)
    assert 0.8 < low < 0.95 and high == 1
    low, high = interval_of([0.5] * 30)
    assert low < 0.46 and high > 0.54


@pytest.mark.parametrize(("prompts", "samples"), [(30, 32), (30, 1), (64, 4), (8, 4), (200, 1)])
@pytest.mark.parametrize(("a", "b"), [(0.05, 1.0), (0.3, 0.3), (1, 9), (2, 2), (0.2, 0.02)])
def test_an_interval_holds_the_truth_in_95_of_100_cases(prompts, samples, a, b):
    """For sets of prompts of any difficulty; without the prompts that are added, 86 of 100 for the first."""
    generator = numpy.random.default_rng(0)
    chances = generator.beta(a, b, (1500, prompts))
    means = generator.binomial(samples, chances) / samples
    held = [low <= a / (a + b) <= high for low, high in map(interval_of, means.tolist())]
    assert 0.935 <= sum(held) / len(held) <= 1.0


def test_rewards_beyond_0_and_1_have_the_normal_interval():
    low, high = interval_of([-1.0, 0.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(1.0)
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(10 / 3 / 4), rel=1e-6)
    assert all(map(math.isnan, interval_of([3.0]))) and all(map(math.isnan, interval_of([])))


def test_the_mean_of_sets_is_surer_than_each():
    low, high = interval_of_mean([0.5, 0.3], [(0.4, 0.7), (0.3, 0.4)])
    assert (low, high) == pytest.approx((0.4 - 0.1 / 2, 0.4 + math.hypot(0.2, 0.1) / 2))


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
