"""Intervals of 95 % of a mean: how far other prompts of the same kind, and other seeds, may move it.

    interval_of(values)                  # over prompts, of one value for each (arXiv 2411.00640)
    crossed(values).interval             # over seeds and prompts, of the values of each seed and prompt
    crossed(differences).interval        # paired: both methods had these seeds and prompts

The k samples of one prompt are not taken for k prompts, and the prompts of one seed not for other seeds: values of one
seed are alike, since one model gave all of them, and so are those of one prompt.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance
from typing import NamedTuple

from srft.errors import missing
from srft.metrics import mean

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)
Z = NormalDist().inv_cdf(0.975)


def interval_of(values: Sequence[float]) -> Interval:
    """95 % interval of the mean over prompts, of one value for each; unknown of a single one beyond [0, 1].

    Of values in [0, 1] it is Wilson's, for as many independent yes-or-no prompts as would have the variance of these.
    """
    n, center = len(values), mean(list(values))
    if not values or math.isnan(center):
        return UNKNOWN
    if min(values) < 0 or max(values) > 1:
        half = Z * math.sqrt(variance(values) / n) if n > 1 else math.nan
        return center - half, center + half
    return wilson(center, effective(values))


def effective(values: Sequence[float]) -> float:
    """How many independent yes-or-no prompts would have the variance of these values in [0, 1].

    Measured with one wrong and one right prompt more, without which a few that are alike would be sure.
    """
    more = [*values, 0.0, 1.0]
    return len(values) * fmean(more) * (1 - fmean(more)) / variance(more)


def wilson(share: float, n: float, quantile: float = Z) -> Interval:
    """Wilson's interval of a share of n; a share of 0 or 1 is an end of its own."""
    middle = (share + quantile**2 / (2 * n)) / (1 + quantile**2 / n)
    half = quantile * math.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2)) / (1 + quantile**2 / n)
    return (max(0.0, middle - half) if share else 0.0), (min(1.0, middle + half) if share < 1 else 1.0)


class Spread(NamedTuple):
    """A variance, and its degrees of freedom."""

    variance: float
    freedom: float


class Crossed(NamedTuple):
    """The mean of values of seeds and prompts, and its interval.

    seeds: variance between the seeds' means, where there are several.
    """

    mean: float
    interval: Interval
    seeds: Spread | None


def crossed(values: Sequence[Sequence[float]], known: Spread | None = None, share: bool = False) -> Crossed:
    """Of values (seeds, prompts), both of which might have been others.

    The variance of the mean is that of the seeds' means / S plus that of the prompts' means / P, less what is in both;
    its degrees of freedom follow from theirs (Satterthwaite). Of fewer than three seeds how they differ is taken to be
    what is known of it; of one, where nothing is, the interval is over prompts alone. share: the values are in [0, 1],
    and the interval is Wilson's, as in `interval_of`.
    """
    seeds, prompts = len(values), len(values[0])
    of_seeds, of_prompts = [fmean(row) for row in values], [fmean(column) for column in zip(*values)]
    center = fmean(of_seeds)
    found = Spread(variance(of_seeds), seeds - 1) if seeds > 1 else None
    if prompts < 2:
        return Crossed(center, UNKNOWN, found)
    spread = found if seeds > 2 else known or found or Spread(0.0, 1)  # two seeds are often alike by chance
    more = [*of_prompts, 0.0, 1.0] if share else of_prompts
    by_seeds, by_prompts, in_both = spread.variance / seeds, variance(more) / prompts, 0.0
    if found:
        left = (values[s][p] - of_seeds[s] - of_prompts[p] + center for s in range(seeds) for p in range(prompts))
        in_both = math.fsum(each**2 for each in left) / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
    total = max(by_seeds + by_prompts - in_both, by_seeds, by_prompts)
    of_shares = all(-1 <= value <= 1 for value in of_prompts)
    if not total and of_shares:  # alike: as sure as two prompts more would leave it
        total = by_prompts = variance([*of_prompts, -1.0, 1.0]) / prompts
    if not total:
        return Crossed(center, (center, center), found)
    freedom = total**2 / (by_seeds**2 / spread.freedom + by_prompts**2 / (prompts - 1))
    quantile = student(freedom)
    if share:
        middle = fmean(more)
        return Crossed(center, wilson(center, middle * (1 - middle) / total, quantile), found)
    half = quantile * math.sqrt(total)
    low, high = center - half, center + half
    return Crossed(center, (max(low, -1.0), min(high, 1.0)) if of_shares else (low, high), found)


def student(freedom: float) -> float:
    """What a Student's t of so many degrees of freedom passes in 2.5 % of cases."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise missing("scipy", "intervals over seeds") from error
    return float(t.ppf(0.975, freedom))


def pooled(spreads: Sequence[Spread]) -> Spread | None:
    """The variance that several have in common; None of none."""
    freedom = sum(each.freedom for each in spreads)
    return Spread(sum(each.variance * each.freedom for each in spreads) / freedom, freedom) if freedom else None


def interval_of_mean(means: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Of the mean of independent means: the distances of their ends add up as deviations do."""
    lower = math.hypot(*(each - low for each, (low, _) in zip(means, intervals)))
    upper = math.hypot(*(high - each for each, (_, high) in zip(means, intervals)))
    return mean(list(means)) - lower / len(means), mean(list(means)) + upper / len(means)


def shown(interval: Sequence[float | None] | None, form: str = "{:.3f} – {:.3f}") -> str:
    """For people; nothing of one that is unknown: NaN, or None where it is from JSON."""
    return "" if not interval or any(end is None or math.isnan(end) for end in interval) else form.format(*interval)


def shown_signed(interval: Interval) -> str:
    """Of a difference."""
    return shown(interval, "{:+.3f} … {:+.3f}")
