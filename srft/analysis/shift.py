"""What a model says of each token beside what the base said of it, and means of that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srft.analysis.reading import Reading, divergence, ranks
from srft.intervals import UNKNOWN, Interval, student
from srft.metrics import mean

CHANGED = math.log(2)  # a token is changed whose probability has at least doubled or halved
MARGINAL = 3  # of the base's likeliest tokens: what a model prefers and is among them is a marginal shift
BINS = np.linspace(-8, 8, 65)  # of Δ log p, nats; what is beyond is in the last ones


@dataclass(frozen=True)
class Shift:
    """Of the N tokens of the texts, each (N,).

    kl: KL(base ‖ model) of what may follow, nats.   js: Jensen-Shannon divergence of the two, nats.
    change: log p of the token under the model minus that under the base.   before, after: entropies, nats.
    rank: how many tokens the base finds likelier than that which the model finds likeliest.
    """

    kl: np.ndarray
    js: np.ndarray
    change: np.ndarray
    before: np.ndarray
    after: np.ndarray
    rank: np.ndarray

    def of(self, where: np.ndarray) -> "Shift":  # (N,) bool
        return Shift(**{name: values[where] for name, values in vars(self).items()})


def shift(base: Reading, model: Reading) -> Shift:
    found = {
        "kl": divergence("forward_kl", base, model),
        "js": divergence("jensen_shannon", base, model),
        "change": model.logprobs - base.logprobs,
        "before": base.entropy,
        "after": model.entropy,
        "rank": ranks(base, model.likeliest),
    }
    return Shift(**{name: values.double().cpu().numpy() for name, values in found.items()})


def summary(own: Shift, text: np.ndarray) -> dict[str, Any]:
    """Means over tokens; that of KL with an interval.   text: (N,) which one each token is of."""
    return {
        "tokens": len(text),
        "kl": average(own.kl),
        "kl_interval": interval_over(own.kl, text),
        "js": average(own.js),
        "change": average(own.change),
        "changed": average(np.abs(own.change) >= CHANGED),
        "entropy_before": average(own.before),
        "entropy_after": average(own.after),
        "weight_down": average(np.exp(-own.after)),
        "weight_up": average(np.exp(own.after)),
        "unshifted": average(own.rank == 0),
        "marginal": average((own.rank > 0) & (own.rank < MARGINAL)),
        "shifted": average(own.rank >= MARGINAL),
    }


def interval_over(values: np.ndarray, text: np.ndarray) -> Interval:
    """95 % interval of the mean over tokens, (N,) each, of what is not negative. Independent are texts, of different
    lengths."""
    _, number = np.unique(text, return_inverse=True)
    lengths, sums = np.bincount(number), np.bincount(number, values)
    if (count := len(lengths)) < 2:
        return UNKNOWN
    residuals = (sums - values.mean() * lengths) / lengths.mean()
    half = student(count - 1) * math.sqrt(residuals.var(ddof=1) / count)
    return max(0.0, float(values.mean() - half)), float(values.mean() + half)


def average(values: np.ndarray) -> float:
    return mean(values.astype(float).tolist())


def histogram(change: np.ndarray) -> list[tuple[float, float]]:
    """[(Δ log p, share of the tokens per nat)]"""
    counts, _ = np.histogram(change.clip(BINS[0], BINS[-1]), BINS)
    width = BINS[1] - BINS[0]
    return [(float(left + width / 2), float(n / len(change) / width)) for left, n in zip(BINS, counts)]


def by_position(change: np.ndarray, position: np.ndarray) -> list[tuple[float, float]]:
    """[(first position, mean |Δ log p|)] of positions 0, 1, 2–3, 4–7, …"""
    octave = np.frexp(position.astype(float))[1]  # 0, 1, 2, 2, 3, 3, 3, 3, …
    return [
        (float(2 ** (int(each) - 1) if each else 0), average(np.abs(change[octave == each])))
        for each in np.unique(octave)
    ]


def by_entropy(change: np.ndarray, entropy: np.ndarray, parts: int = 8) -> list[tuple[float, float]]:
    """[(mean entropy before, mean |Δ log p|)] of parts of equally many tokens, in the order of that entropy."""
    order: Sequence[np.ndarray] = np.array_split(np.argsort(entropy, kind="stable"), parts)
    return [(average(entropy[part]), average(np.abs(change[part]))) for part in order if len(part)]
