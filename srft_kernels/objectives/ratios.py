"""Ratios of probabilities: what objectives weigh and clip, and the correction for rollouts of another program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks

# e^20 = 4.9e8: no ratio of probabilities beyond it says anything, but its overflow would turn a clipped gradient into
# 0 · ∞. Log-ratios are cut there.
LOG_RATIO_LIMIT = 20.0
LOWEST_LOGPROB = -1e30  # stands for −inf, which could not be subtracted from itself


@checks.options
@dataclass(frozen=True)
class Correction:
    """Importance weights ρ = π_train / π_sampler, kept within bounds.

    outside   what a ρ outside [low, high] becomes: "truncate" the nearer bound (truncated importance sampling);
              "mask" 0 (masked importance sampling, IcePop of arXiv 2510.18855); "reject" 0, and 1 instead of ρ inside
              (rejection alone). A ρ of NaN stays one in each: what a sampler could not tell is not hidden, and the
              metric `correction_nan` is the share of such tokens
    level     ρ of each "token"; of its "sequence" (the product over its tokens); their "geometric" mean over it
    current   π_train is the policy as it is now, even where its log-probs at sampling time are known: with the latter
              for the sampler's, this rejects tokens by the ratio that a clip looks at

    As an option of any built-in objective, `grpo(correction=Correction())`, it multiplies the policy term, not KL or
    entropy; annotations `sampler_logprobs`, `old_logprobs` if the rollouts are not fresh (else the policy as it is now
    is taken, as a constant), `sequence_ids` above the token level, where a token's loss then depends on other tokens.

    As a function of the two log-probs it makes the same weights before the step, once and at any level:
    `advantages * weights` is the option with one pass, `token_weight * weights` weighs KL and entropy too, and
    `mask & (weights > 0)` keeps rejected tokens out of an average's denominator.
    """

    outside: str = "truncate"
    level: str = "token"
    low: float = 0.0
    high: float = 2.0
    current: bool = False

    def __post_init__(self):
        checks.one_of(self, outside=("truncate", "mask", "reject"), level=("token", "sequence", "geometric"))
        checks.finite(self, "high")
        if not 0 <= self.low <= self.high or self.high == 0:
            raise ValueError(f"Correction(low={self.low!r}, high={self.high!r}): expected 0 ≤ low ≤ high and high > 0")

    def __call__(
        self, logprobs: Tensor, sampler_logprobs: Tensor, sequence_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:  # (...) each
        """Weights (...) of tokens with log-probs (...) under the trainer and under the sampler; no gradient.

        `sequence_ids` (...) integers ≥ 0, above the token level; `mask` (...) boolean: tokens where it does not hold
        take no part and get 0. Computed in fp32, in fp64 where one of the two is.
        """
        checks.tensor("logprobs", logprobs)
        checks.numbers("logprobs", logprobs)
        checks.shaped_like("sampler_logprobs", sampler_logprobs, logprobs, "logprobs")
        for name, value in (("sequence_ids", sequence_ids), ("mask", mask)):
            if value is not None:
                checks.shaped_like(name, value, logprobs, "logprobs")
        dtype = torch.promote_types(torch.promote_types(logprobs.dtype, sampler_logprobs.dtype), torch.float32)
        mask = None if mask is None else mask.bool()
        ratio = self.ratio(logprobs.to(dtype), sampler_logprobs.detach().to(dtype), sequence_ids, mask)
        return self.bounded(ratio, mask)

    def ratio(
        self, logprobs: Tensor, sampler_logprobs: Tensor, sequence_ids: Tensor | None, mask: Tensor | None
    ) -> Tensor:  # (...) each
        """ρ at the level asked for, not yet bounded."""
        change = log_ratio(logprobs.detach(), sampler_logprobs)
        if self.level != "token":
            if sequence_ids is None:
                raise ValueError(f"Correction(level={self.level!r}) needs sequence_ids, an integer per token")
            change = over_sequences(change, sequence_ids, mask, mean=self.level == "geometric")
        return change.clamp(max=LOG_RATIO_LIMIT).exp()

    def bounded(self, ratio: Tensor, mask: Tensor | None = None) -> Tensor:  # (...), (...)
        """Weights from ρ."""
        if self.outside == "truncate":
            weights = clipped(ratio, self.low, self.high)
        else:
            weights = ratio if self.outside == "mask" else torch.where(ratio.isnan(), ratio, 1)
            weights = torch.where(self.beyond(ratio), 0, weights)
        return weights if mask is None else torch.where(mask, weights, 0)

    def beyond(self, ratio: Tensor) -> Tensor:  # (...)
        """Where ρ lies outside the bounds; a NaN does not."""
        return (ratio < self.low) | (ratio > self.high)


NO_CORRECTION = Correction()  # whose options device code has, compiled out


# Shapes of a ratio u, which change how much the unlikely count (arXiv 2504.14945 and its code).
SHAPES = ("p/(p+c)", "p^c", "c*log p", "p+c*log p")


def shape(log_u: Tensor, kind: str, c: float | None) -> Tensor:  # (n,)
    """u where c is None, else the shape of it."""
    if c is None:
        return log_u.exp()
    if kind == "p/(p+c)":
        u = log_u.exp()
        return u / (u + c)
    if kind == "p^c":
        return (c * log_u).exp()
    return c * log_u if kind == "c*log p" else log_u.exp() + c * log_u


def check_shape(owner: object, of: str) -> None:
    """The two options of a shape: `of`_shape, one of SHAPES, and `of`_shaping, its c > 0, or None for no shape."""
    kind, c = f"{of}_shape", f"{of}_shaping"
    checks.one_of(owner, **{kind: SHAPES})
    checks.above_zero(owner, c)
    if getattr(owner, c) is None and getattr(owner, kind) != SHAPES[0]:
        raise ValueError(f"{type(owner).__name__}({kind}={getattr(owner, kind)!r}) needs its number c: pass {c}=c > 0")


def silenced(weight: Tensor, values: Tensor) -> Tensor:  # (n,), (n,)
    """weight · values, and 0 where the weight is, though the value be infinite: log-probs can be −inf."""
    return torch.where(weight == 0, 0, weight * values)


# Derivatives at bounds and ties are defined here, since PyTorch's differ from version to version (clamp) and from what
# a kernel does (maximum halves them at a tie).


def clipped(x: Tensor, low: float, high: float) -> Tensor:  # (n,)
    """x within [low, high], with a derivative of 1 at either bound; a NaN stays."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def larger(a: Tensor, b: Tensor) -> Tensor:  # (n,), (n,)
    """Their maximum, with the derivative of `a` where they tie; `a` where one is NaN."""
    return torch.where(b > a, b, a)


def slope(logprobs: Tensor) -> Tensor:
    """0 with the derivative of `logprobs`, also where they are −inf and ℓ − sg(ℓ) would be NaN."""
    return _Slope.apply(logprobs)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs: Tensor) -> Tensor:
        return torch.zeros_like(logprobs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def log_ratio(logprobs: Tensor, others: Tensor) -> Tensor:  # (n,), (n,)
    """log of p / p_other: −inf where p is 0, a large number where only p_other is."""
    return logprobs - others.clamp(min=LOWEST_LOGPROB)


def over_sequences(values: Tensor, sequence_ids: Tensor, mask: Tensor | None = None, mean: bool = True) -> Tensor:
    """Sum or mean of `values` (...) over the tokens (of the mask) that share an id, given back to each token."""
    flat, index = values.flatten(), groups(sequence_ids.flatten())
    counted = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.flatten()
    zeros = torch.zeros_like(flat, dtype=exact(flat.device))
    total = zeros.index_add(0, index, torch.where(counted, flat, 0).to(zeros.dtype))
    if mean:
        total = total / zeros.index_add(0, index, counted.to(zeros.dtype)).clamp(min=1)
    return total[index].to(flat.dtype).view(values.shape)


def exact(device: torch.device) -> torch.dtype:
    """The type of sums over a million tokens, and of quotients of counts: fp64, which MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def groups(ids: Tensor) -> Tensor:
    """ids (n,) → numbers (n,) in [0, n) that are equal where the ids are; unlike `unique`, never waits for a device."""
    order = ids.argsort()
    sorted_ids = ids[order]
    steps = torch.cat([sorted_ids.new_zeros(1, dtype=torch.bool), sorted_ids[1:] != sorted_ids[:-1]])[: len(ids)]
    return torch.empty_like(order).scatter_(0, order, steps.cumsum(0))
