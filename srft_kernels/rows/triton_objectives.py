"""Objectives as device code: one token's loss and its derivatives, inside the kernel that has its row.

A formula here is the twin of an objective's, which names it (`twin=`), with the derivatives by hand; the tests compare
the two on every option. What has no twin, a caller's function for one, runs between two kernels (see triton_rows).

    formula(O, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth) -> loss, g, k, u

g, k and u are the derivatives to ℓ, lse and the smoothing statistic. An option is read as `O.name`, at compile time:
text, integers, booleans, and of a number only whether it is there (None) and not zero. The number itself arrives at run
time as `numbers.name`, so that scheduling one does not compile a kernel per step. An annotation is `columns.name`, a
pointer, None where it was not given. A new option of a dataclass is here at once, and so is a name that it `reads`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Collection
from dataclasses import fields
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..objectives.objective import Objective, Terms, Tokens
from ..objectives.ratios import LOG_RATIO_LIMIT, NO_CORRECTION

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


class Twin(NamedTuple):
    """An objective's device code.

    formula    a function that Triton compiles
    structure  what of the options decides which code that is, by name; plain values, since Triton takes a named tuple
               apart, and its hooks write compile-time arguments as JSON
    numbers    those of the options, by name
    """

    formula: Any
    structure: tuple[Any, ...]
    numbers: tuple[float, ...]


def twin(objective: Objective, names: Collection[str] = ()) -> Twin | None:
    """That of an objective which has one and, with these annotations, needs one token alone."""
    if objective.twin is None or objective.scope(names) != "token":
        return None
    return _twin(objective)


@lru_cache(maxsize=64)  # a call asks once per chunk, while its products wait
def _twin(objective: Terms) -> Twin:
    options = _options(objective)
    options |= _options(objective.correction or NO_CORRECTION, "correction_")
    numeric = {name for name, (value, is_number) in options.items() if is_number}
    structure = {
        # a number leaves only its presence: None, zero or not
        name: value if name not in numeric or value is None else value != 0
        for name, (value, _) in options.items()
    }
    structure["correction"] = objective.correction is not None
    structure["demonstrated"] = "is_demo" in objective.requires(())
    values = (float("inf") if options[name][0] is None else float(options[name][0]) for name in sorted(numeric))
    kind = type(objective).__name__
    module, _, formula = objective.twin.partition(":")
    return Twin(
        getattr(import_module(module), formula),
        _names(kind, tuple(structure))(*structure.values()),
        _names(kind + "Numbers", tuple(sorted(numeric)))(*values),
    )


def _options(options: Any, prefix: str = "") -> dict[str, tuple[Any, bool]]:
    """{name: (value, whether it is a number)} of a dataclass."""
    return {
        prefix + field.name: (getattr(options, field.name), field.type in ("float", "float | None"))
        for field in fields(options)
    }


@cache
def _names(kind: str, names: tuple[str, ...]) -> type:
    return namedtuple(kind, names)


def column_names(objective: Objective) -> tuple[str, ...]:
    """Annotations that device code may read: not which sequence a token is of, but its class's weight."""
    return (*(name for name in objective.reads if name != "sequence_ids"), "class_weight")


def columns(objective: Objective, tokens: Tokens) -> tuple[torch.Tensor | None, ...]:
    """Them by name, (n,) fp32 (is_demo: bytes), contiguous; None where not given."""
    names = column_names(objective)
    values = (tokens.get(name) for name in names)
    return _names("Columns", names)(
        *(
            c if c is None else c.contiguous().view(torch.uint8) if c.dtype == torch.bool else c.float().contiguous()
            for c in values
        )
    )


@triton.jit
def token_loss(
    FORMULA: tl.constexpr, O: tl.constexpr, numbers, columns, row, logprob, entropy, logsumexp, smooth
):  # fmt: skip
    """(loss, g, h, k, u): the token's loss and its derivatives to ℓ, H, lse and the smoothing statistic.

    O, numbers and columns by name; row of the annotations. The terms are those of `Terms`.
    """
    sampled = True
    if O.demonstrated:
        sampled = tl.load(columns.is_demo + row) == 0
    loss, g, k, u = FORMULA(O, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth)
    h = tl.zeros_like(logprob)
    if O.max_probability is not None:
        kept = tl.where(tl.exp(logprob) > numbers.max_probability, 0.0, 1.0)
        loss = _silenced(kept, loss)
        g = _silenced(kept, g)
        k = _silenced(kept, k)
        u = _silenced(kept, u)
    if O.correction:
        weight = tl.where(sampled, _correction(O, numbers, columns, row, logprob), 1.0)
        loss = _silenced(weight, loss)
        g = tl.where(g == 0.0, 0.0, _silenced(weight, g))  # what has no slope has none under a NaN, as in autograd
        k = tl.where(k == 0.0, 0.0, _silenced(weight, k))
        u = tl.where(u == 0.0, 0.0, _silenced(weight, u))
    if O.kl_coef:
        gap = _log_ratio(tl.load(columns.ref_logprobs + row), logprob)
        gap = tl.where(gap < -LIMIT, -LIMIT, gap)
        if O.kl_estimator == "k1":
            kl = -gap
            slope = tl.zeros_like(gap) + 1.0
        elif O.kl_estimator == "k2":
            kl = gap * gap / 2
            slope = -gap
        else:
            rise = _expm1(gap)
            kl = rise - gap
            slope = -rise
        loss += tl.where(sampled, numbers.kl_coef * kl, 0.0)
        g += tl.where(sampled, numbers.kl_coef * slope, 0.0)
    if O.entropy_coef:
        loss -= numbers.entropy_coef * entropy
        h -= numbers.entropy_coef
    return loss, g, h, k, u


@triton.jit
def cross_entropy(O: tl.constexpr, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth):
    weight = tl.zeros_like(logprob) + 1.0
    if O.probability_weighted:
        weight = tl.exp(logprob)
    if columns.class_weight is not None:
        weight *= tl.load(columns.class_weight + row)
    loss = -_silenced(weight, logprob)
    g = -weight
    k = tl.zeros_like(logprob)
    u = tl.zeros_like(logprob)
    if O.label_smoothing:
        loss = (1 - numbers.label_smoothing) * loss - numbers.label_smoothing * smooth
        g = (1 - numbers.label_smoothing) * g
        u -= numbers.label_smoothing
    if O.z_loss:
        loss += numbers.z_loss * logsumexp * logsumexp
        k = 2 * numbers.z_loss * logsumexp
    return loss, g, k, u


@triton.jit
def policy_gradient(O: tl.constexpr, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth):
    loss, g = _surrogate(O, numbers, columns, row, logprob, tl.load(columns.advantages + row))
    return loss, g, tl.zeros_like(g), tl.zeros_like(g)


@triton.jit
def _surrogate(O: tl.constexpr, numbers, columns, row, logprob, signal):
    """(loss, g) of a sampled token; signal is the advantage, as a rule."""
    if O.surrogate == "reinforce":
        return _silenced(-signal, logprob), -signal
    else:
        if columns.old_logprobs is None:  # fresh data
            old = logprob
            log_r = tl.zeros_like(logprob)
        else:
            old = tl.load(columns.old_logprobs + row)
            log_r = tl.where(signal == 0.0, 0.0, _log_ratio(logprob, old))
            old = tl.where(signal == 0.0, logprob, old)
        c = numbers.ratio_shaping
        if O.ratio_shaping is not None and O.ratio_shape == "p/(p+c)":
            lower = tl.exp(logprob) + c
            ratio = tl.exp(log_r) * (tl.exp(old) + c) / lower
            slope = ratio * c / lower
        else:
            RATIO_SHAPED: tl.constexpr = O.ratio_shaping  # Triton 3.6 passes no plain value on
            RATIO_SHAPE: tl.constexpr = O.ratio_shape
            ratio, slope = _shape(RATIO_SHAPED, RATIO_SHAPE, log_r, c)
        clipped = _clipped(ratio, 1 - numbers.clip_low, 1 + numbers.clip_high)
        if O.surrogate == "cispo":
            return _silenced(-signal * clipped, logprob), -signal * clipped
        elif O.surrogate == "sapo":
            tau = tl.where(signal > 0, numbers.tau_positive, numbers.tau_negative)
            gate = 1 / (1 + tl.exp(-tau * (ratio - 1)))
            return -signal * gate * 4 / tau, -signal * 4 * gate * (1 - gate) * slope
        else:
            plain = _silenced(-signal, ratio)
            bound = _silenced(-signal, clipped)
            worse = bound > plain
            loss = tl.where(worse, bound, plain)
            g = tl.where(worse, 0.0, -signal * slope)
            if O.dual_clip is not None:
                bound = -signal * numbers.dual_clip
                bounded = (signal < 0) & (loss > bound)
                loss = tl.where(bounded, bound, loss)
                g = tl.where(bounded, 0.0, g)
            return loss, g


@triton.jit
def srft(O: tl.constexpr, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth):
    advantage = tl.load(columns.advantages + row)
    if columns.weight_entropy is not None:
        level_entropy = tl.load(columns.weight_entropy + row)
    else:
        level_entropy = entropy
    p = tl.exp(logprob)

    # demonstration: sft_coef · w · (−ℓ) − rl_coef · A · shape(u)
    demo_weight = tl.zeros_like(logprob) + 1.0
    if O.demo_weight == "entropy":
        demo_weight = tl.exp(O.entropy_sign * level_entropy)
    elif O.demo_weight == "p":
        demo_weight = p
    elif O.demo_weight == "p(1-p)":
        demo_weight = p * (1 - p)
    demo_loss = tl.zeros_like(logprob)
    demo_g = tl.zeros_like(logprob)
    if O.demo_sft_coef:
        demo_weight *= numbers.demo_sft_coef
        demo_loss = _silenced(-demo_weight, logprob)
        demo_g = -demo_weight
    if O.demo_rl_coef:  # else there may be no advantage
        log_u = logprob
        if columns.demo_logprobs is not None:
            log_u = _log_ratio(logprob, tl.load(columns.demo_logprobs + row))
        DEMO_SHAPED: tl.constexpr = O.demo_shaping
        DEMO_SHAPE: tl.constexpr = O.demo_shape
        shaped, slope = _shape(DEMO_SHAPED, DEMO_SHAPE, log_u, numbers.demo_shaping)
        if O.demo_min is not None:
            slope = tl.where(shaped < numbers.demo_min, 0.0, slope)
            shaped = tl.where(shaped < numbers.demo_min, numbers.demo_min, shaped)
        if O.demo_max is not None:
            slope = tl.where(shaped > numbers.demo_max, 0.0, slope)
            shaped = tl.where(shaped > numbers.demo_max, numbers.demo_max, shaped)
        push = -numbers.demo_rl_coef * advantage
        demo_loss += _silenced(push, shaped)
        demo_g += push * slope

    # rollout: v · surrogate
    success = advantage
    if O.positive == "reward":
        success = tl.load(columns.rewards + row)
    positive = success > 0
    if O.rollout_signal == "advantage":
        signal = advantage
    else:
        signal = tl.where(positive, 1.0, -1.0)
        if O.positive == "advantage":
            signal = tl.where(advantage == 0, 0.0, signal)
    rollout_loss, rollout_g = _surrogate(O, numbers, columns, row, logprob, signal)
    reward_weight = tl.zeros_like(logprob) + numbers.rollout_coef
    if O.rollout_weight == "entropy":
        reward_weight *= tl.exp(level_entropy)
    weight = tl.where(positive, reward_weight, numbers.negative_coef)
    weight = tl.where(success == success, weight, success)  # a NaN is neither positive nor negative

    loss = tl.where(sampled, _silenced(weight, rollout_loss), demo_loss)
    g = tl.where(sampled, weight * rollout_g, demo_g)
    return loss, g, tl.zeros_like(g), tl.zeros_like(g)


@triton.jit
def _shape(SHAPED: tl.constexpr, SHAPE: tl.constexpr, log_u, c):
    """(u or the shape of it, its derivative to log u)."""
    u = tl.exp(log_u)
    if SHAPED is None:
        return u, u
    elif SHAPE == "p/(p+c)":
        return u / (u + c), u * c / ((u + c) * (u + c))
    elif SHAPE == "p^c":
        power = tl.exp(c * log_u)
        return power, c * power
    elif SHAPE == "c*log p":
        return c * log_u, tl.zeros_like(u) + c
    else:
        return u + c * log_u, u + c


@triton.jit
def _correction(O: tl.constexpr, numbers, columns, row, logprob):
    """The importance weight of a sampled token."""
    trained = logprob
    if columns.old_logprobs is not None and not O.correction_current:
        trained = tl.load(columns.old_logprobs + row)
    ratio = tl.exp(_log_ratio(trained, tl.load(columns.sampler_logprobs + row)))
    low = numbers.correction_low
    high = numbers.correction_high
    beyond = (ratio < low) | (ratio > high)  # never for a NaN
    if O.correction_outside == "truncate":
        return _clipped(ratio, low, high)
    elif O.correction_outside == "mask":
        return tl.where(beyond, 0.0, ratio)
    else:
        return tl.where(beyond, 0.0, tl.where(ratio == ratio, 1.0, ratio))


@triton.jit
def _clipped(x, low, high):
    """x within [low, high]; a NaN stays, which a minimum would drop."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _log_ratio(logprob, other):
    """log of p / p_other, at most LIMIT; NaN where ℓ is, which a minimum would drop."""
    change = logprob - tl.where(other < -1e30, -1e30, other)
    return tl.where(change > LIMIT, LIMIT, change)


@triton.jit
def _silenced(weight, value):
    """weight · value, and 0 where the weight is, though the value be infinite."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _expm1(x):
    """e^x − 1, by its series where the difference would cancel."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1)
