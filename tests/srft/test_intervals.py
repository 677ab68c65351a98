"""Intervals hold the truth as often as they say, over prompts, and over seeds and prompts."""

import math

import numpy
import pytest
from scipy.stats import t

from srft.intervals import Spread, crossed, interval_of, interval_of_mean, pooled


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


def test_an_interval_over_seeds_and_prompts_by_hand():
    """Two seeds, three prompts. Means of seeds 2 and 4, of prompts 1, 3, 5; what is in neither: ∓1, 0, ±1."""
    found = crossed([[1.0, 2.0, 3.0], [1.0, 4.0, 7.0]])
    by_seeds, by_prompts, in_both = 2 / 2, 4 / 3, (4 * 1) / (1 * 2) / 6
    total = by_seeds + by_prompts - in_both
    freedom = total**2 / (by_seeds**2 / 1 + by_prompts**2 / 2)
    half = t.ppf(0.975, freedom) * math.sqrt(total)
    assert found.mean == 3 and found.interval == pytest.approx((3 - half, 3 + half))
    assert found.seeds == Spread(2.0, 1)


def test_of_one_seed_the_interval_is_over_prompts_unless_it_is_known_how_seeds_differ():
    values = [[0.0, 2.0, 2.0, 0.0, 2.0]]
    low, high = crossed(values).interval
    assert high - low == pytest.approx(2 * t.ppf(0.975, 4) * math.sqrt(1.2 / 5))
    wider = crossed(values, Spread(2.0, 6)).interval
    assert wider[0] < low - 0.5 and wider[1] > high + 0.5
    assert all(map(math.isnan, crossed([[1.0]]).interval))
    assert pooled([]) is None and pooled([Spread(1.0, 1), Spread(4.0, 2)]) == (3.0, 3)


def test_shares_stay_between_0_and_1_and_few_that_are_alike_are_not_sure():
    low, high = crossed([[0.0] * 30] * 3, share=True).interval
    assert low == 0 and 0.05 < high < 0.2
    for alike in (0.0, 1.0):  # differences that are the same everywhere
        low, high = crossed([[alike] * 30] * 3).interval
        assert alike - 0.15 < low < alike - 0.05 and high == pytest.approx(min(1, 2 * alike - low), abs=0.03)
    low, high = crossed([[1.0] * 2] * 2).interval
    assert low < 0  # of two prompts nothing is sure
    low, high = crossed([[0.0] * 29 + [0.125]] * 3, share=True).interval
    assert low >= 0


def simulated(generator, seeds: int, spread: float, effect: float) -> list[numpy.ndarray]:
    """Shares (seeds, prompts) of 8 samples that are right, of two methods on the same 40 prompts."""
    prompts = generator.normal(-0.5, 2, 40)
    of_methods = []
    for shift in (0, effect):
        logits = prompts + shift + generator.normal(0, spread, (seeds, 1)) + generator.normal(0, 0.5, (seeds, 40))
        of_methods.append(generator.binomial(8, 1 / (1 + numpy.exp(-logits))) / 8)
    return of_methods


def expected(spread: float, shift: float) -> float:
    generator = numpy.random.default_rng(1)
    logits = generator.normal(-0.5, 2, 400_000) + shift + generator.normal(0, math.hypot(spread, 0.5), 400_000)
    return float((1 / (1 + numpy.exp(-logits))).mean())


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("effect", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_differences_of_simulated_runs(spread, effect, seeds):
    """The interval holds the known difference in 95 of 100 studies; hardly any finds one where there is none."""
    generator = numpy.random.default_rng(0)
    truth, level = expected(spread, effect) - expected(spread, 0), expected(spread, 0)
    held, held_level, better, worse, tries = 0, 0, 0, 0, 600
    for _ in range(tries):
        one, another = simulated(generator, seeds, spread, effect)
        low, high = crossed((another - one).tolist()).interval
        low_level, high_level = crossed(one.tolist(), share=True).interval
        held, held_level = held + (low <= truth <= high), held_level + (low_level <= level <= high_level)
        better, worse = better + (low > 0), worse + (high < 0)
    assert held / tries >= 0.92 and held_level / tries >= 0.92
    assert worse / tries <= 0.04 and (effect or better / tries <= 0.04)
    if effect and not spread:
        assert better / tries >= 0.9  # and it does find one


def test_methods_of_one_seed_borrow_how_seeds_differ():
    """Six methods with three seeds tell it. Over prompts alone the interval would hold the truth in 70 of 100 cases."""
    generator = numpy.random.default_rng(0)
    held, alone, tries = 0, 0, 300
    for _ in range(tries):
        spreads = [crossed((b - a).tolist()).seeds for a, b in (simulated(generator, 3, 0.3, 0) for _ in range(6))]
        one, another = simulated(generator, 1, 0.3, 0)
        low, high = crossed((another - one).tolist(), pooled(spreads)).interval
        held += low <= 0 <= high
        low, high = crossed((another - one).tolist()).interval
        alone += low <= 0 <= high
    assert held / tries >= 0.93 and alone / tries < 0.8
