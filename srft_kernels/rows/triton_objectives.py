"""The built-in objectives as device code: one token's loss and its derivatives, inside the kernel that has its row.

The formulas are those of objectives.py, with the derivatives by hand; the tests compare the two on every option.
An objective that is not here, a user's callable for one, runs between two kernels instead (see triton_rows).

Strings, integers, booleans and presences of an objective's options are compile-time (`Structure`); its floating-point
coefficients arrive at run time in the order of NUMBERS, so that scheduling one does not compile a kernel per step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import triton
import triton.language as tl

NUMBERS = {
    "CrossEntropy": ("label_smoothing", "z_loss"),
    "PolicyGradient": ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef"),
    "SRFT": (
        "demo_sft_coef",
        "demo_rl_coef",
        "demo_shaping",
        "rollout_coef",
        "negative_coef",
        "clip_low",
        "clip_high",
        "entropy_coef",
    ),
}
# Annotations that the device code reads, each None where it was not given.
COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "is_demo", "rewards", "weight_entropy", "class_weight")


@dataclass(frozen=True)
class Structure:
    """What of an objective decides which code is compiled; option names are attributes."""

    kind: str
    options: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        for key, value in object.__getattribute__(self, "options"):
            if key == name:
                return value
        raise AttributeError(name)


def fused(objective: Any) -> tuple[Structure, tuple[float, ...]] | None:
    """(structure, numbers) of an objective that has device code; None for any other."""
    from ..objectives import SRFT, CrossEntropy, PolicyGradient

    kind = type(objective).__name__
    if type(objective) not in (CrossEntropy, PolicyGradient, SRFT):
        return None
    numbers = NUMBERS[kind]
    options = {field.name: getattr(objective, field.name) for field in fields(objective)}
    structure = {
        # a number leaves only its presence: None, zero or not
        name: value if name not in numbers or value is None else value != 0
        for name, value in options.items()
    }
    values = tuple(float("inf") if options[name] is None else float(options[name]) for name in numbers)
    return Structure(kind, tuple(structure.items())), values


@triton.jit
def token_loss(
    O: tl.constexpr,  # Structure
    numbers,
    row,  # of the annotations
    logprob,
    entropy,
    logsumexp,
    smooth,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    is_demo_ptr,
    rewards_ptr,
    weight_entropy_ptr,
    class_weight_ptr,
):
    """(loss, g, h, k, u): the token's loss and its derivatives to ℓ, H, lse and the smoothing statistic."""
    zero = logprob * 0.0
    if O.kind == "CrossEntropy":
        loss, g, k, u = _cross_entropy(O, numbers, row, logprob, logsumexp, smooth, class_weight_ptr)
        h = zero
    else:
        k = zero
        u = zero
        advantage = tl.load(advantages_ptr + row)
        if O.kind == "PolicyGradient":
            loss, g, h = _policy_gradient(O, numbers, row, logprob, entropy, advantage, old_ptr, ref_ptr)
        else:
            loss, g, h = _srft(
                O, numbers, row, logprob, entropy, advantage, old_ptr, is_demo_ptr, rewards_ptr, weight_entropy_ptr
            )
    return loss, g, h, k, u


@triton.jit
def _cross_entropy(O: tl.constexpr, numbers, row, logprob, logsumexp, smooth, class_weight_ptr):
    label_smoothing, z_loss = numbers
    weight = logprob * 0.0 + 1.0
    if O.probability_weighted:
        weight = tl.exp(logprob)
    if class_weight_ptr is not None:
        weight = weight * tl.load(class_weight_ptr + row)
    loss = -weight * logprob
    g = -weight
    k = logprob * 0.0
    u = logprob * 0.0
    if O.label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * smooth
        g = (1 - label_smoothing) * g
        u = u - label_smoothing
    if O.z_loss:
        loss = loss + z_loss * logsumexp * logsumexp
        k = 2 * z_loss * logsumexp
    return loss, g, k, u


@triton.jit
def _policy_gradient(O: tl.constexpr, numbers, row, logprob, entropy, advantage, old_ptr, ref_ptr):
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef = numbers
    h = logprob * 0.0
    if O.surrogate == "reinforce":
        loss = -advantage * logprob
        g = -advantage
    else:
        ratio = _ratio(row, logprob, old_ptr)
        clipped = _clip(ratio, clip_low, clip_high)
        if O.surrogate == "cispo":
            loss = -clipped * advantage * logprob
            g = -clipped * advantage
        else:
            loss, g = _pessimistic(ratio, clipped, advantage)
            if O.dual_clip is not None:
                bound = -advantage * dual_clip
                bounded = (advantage < 0) & (loss > bound)
                loss = tl.where(bounded, bound, loss)
                g = tl.where(bounded, 0.0, g)
    if O.kl_coef:
        gap = tl.load(ref_ptr + row) - logprob
        rise = _expm1(gap)
        loss = loss + kl_coef * (rise - gap)
        g = g - kl_coef * rise
    if O.entropy_coef:
        loss = loss - entropy_coef * entropy
        h = h - entropy_coef
    return loss, g, h


@triton.jit
def _srft(
    O: tl.constexpr,
    numbers,
    row,
    logprob,
    entropy,
    advantage,
    old_ptr,
    is_demo_ptr,
    rewards_ptr,
    weight_entropy_ptr,
):
    sft_coef, rl_coef, shaping, rollout_coef, negative_coef, clip_low, clip_high, entropy_coef = numbers
    demo = tl.load(is_demo_ptr + row) != 0
    if weight_entropy_ptr is not None:
        level_entropy = tl.load(weight_entropy_ptr + row)
    else:
        level_entropy = entropy
    p = tl.exp(logprob)

    # demonstration: sft_coef · w · (−ℓ) − rl_coef · A · shape(p)
    if O.demo_weight == "entropy":
        demo_weight = sft_coef * tl.exp(O.entropy_sign * level_entropy)
    elif O.demo_weight == "constant":
        demo_weight = sft_coef + logprob * 0.0
    else:
        demo_weight = sft_coef * p * (1 - p)
    if O.demo_shaping is None:
        shaped = p
        slope = p  # dp/dℓ
    else:
        shaped = p / (p + shaping)
        slope = shaped * shaping / (p + shaping)
    demo_loss = -demo_weight * logprob - rl_coef * advantage * shaped
    demo_g = -demo_weight - rl_coef * advantage * slope

    # rollout: v · (−signal · factor)
    if O.positive == "reward":
        positive = tl.load(rewards_ptr + row) > 0
    else:
        positive = advantage > 0
    if O.rollout_signal == "advantage":
        signal = advantage
    else:
        signal = tl.where(positive, 1.0, -1.0)
        if O.positive == "advantage":
            signal = tl.where(advantage == 0, 0.0, signal)
    if O.rollout_factor == "logprob":
        rollout_loss = -signal * logprob
        rollout_g = -signal
    else:
        ratio = _ratio(row, logprob, old_ptr)
        if O.rollout_factor == "ratio":
            rollout_loss = -signal * ratio
            rollout_g = -signal * ratio
        else:
            rollout_loss, rollout_g = _pessimistic(ratio, _clip(ratio, clip_low, clip_high), signal)
    if O.rollout_weight == "entropy":
        reward_weight = rollout_coef * tl.exp(level_entropy)
    else:
        reward_weight = rollout_coef + logprob * 0.0
    weight = tl.where(positive, reward_weight, negative_coef)

    loss = tl.where(demo, demo_loss, weight * rollout_loss)
    g = tl.where(demo, demo_g, weight * rollout_g)
    h = logprob * 0.0
    if O.entropy_coef:
        loss = loss - entropy_coef * entropy
        h = h - entropy_coef
    return loss, g, h


@triton.jit
def _ratio(row, logprob, old_ptr):
    """r = e^{ℓ − ℓ_old}; 1 on fresh data."""
    if old_ptr is None:
        return logprob * 0.0 + 1.0
    else:
        return tl.exp(logprob - tl.load(old_ptr + row))


@triton.jit
def _clip(ratio, low, high):
    return tl.minimum(tl.maximum(ratio, 1 - low), 1 + high)


@triton.jit
def _pessimistic(ratio, clipped, signal):
    """PPO's max(−r·A, −clip(r)·A) and its derivative to ℓ: −r·A where the first is active, since dr/dℓ = r."""
    plain = -ratio * signal
    bounded = -clipped * signal
    return tl.maximum(plain, bounded), tl.where(plain >= bounded, plain, 0.0)


@triton.jit
def _expm1(x):
    """e^x − 1, by its series where the difference would cancel."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1)
