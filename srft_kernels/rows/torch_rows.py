"""The row operations in PyTorch: any device, any floating type; the default on CPUs.

A chunk of logits (n, V) is worked through in blocks of a few rows, small enough for a core's L2 cache: every
operation below reads what the previous one left in the cache, which makes the whole row pass cost a few per cent of
the matrix products around it (on a whole chunk at a time it costs as much as one of them).

A block becomes d = z − shift and then its gradient, in its own memory; for statistics alone a copy of it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..extras import ExtrasBuffer
from ..head import Head
from ..objectives.objective import Objective, Tokens, TokenStats, cat, differentiate, weighted
from . import Coefs, Normalizer

# Far below where e^d becomes exactly 0 (−104; −746 in fp64), so flooring d changes nothing but 0 · (−inf) into 0. Not
# lower: a derivative times d must stay finite to be silenced.
FLOOR = -1e4


@dataclass(frozen=True)
class TorchRows:
    """RowOps (see rows/) on blocks of `block_rows` rows."""

    block_rows: int

    def statistics(
        self, logits: Tensor, target: Tensor, head: Head, extras: ExtrasBuffer | None = None
    ) -> tuple[TokenStats, Normalizer]:  # (n, V), (n,)
        stats, normalizers = [], []
        copy = logits.new_empty(min(self.block_rows, len(logits)), logits.shape[1])
        for rows, exp in blocks(logits, self.block_rows):
            block = copy[: len(exp)].copy_(logits[rows])
            block_stats, normalizer, _, _ = _statistics(block, exp, target[rows], head[rows], extras and extras[rows])
            stats.append(block_stats)
            normalizers.append(normalizer)
        return TokenStats.cat(stats), Normalizer(*map(cat, zip(*normalizers)))

    def loss_and_gradient(
        self, logits: Tensor, dlogits: Tensor, tokens: Tokens, weight: Tensor, objective: Objective, head: Head,
        extras: ExtrasBuffer | None = None,
    ) -> tuple[TokenStats, Tensor]:  # (n, V), (n, V), (n,)  # fmt: skip
        parts, losses = [], []
        for rows, exp in blocks(logits, self.block_rows):
            d, block_tokens, block_head = logits[rows], tokens[rows], head[rows]
            stats, normalizer, total, cap_slope = _statistics(
                d, exp, block_tokens.target, block_head, extras and extras[rows], with_slope=True
            )
            loss, coefs = differentiate(objective, stats, block_tokens, weight[rows])
            _gradient_(d, exp, total, normalizer.mean, block_tokens.target, coefs, block_head, cap_slope)
            if dlogits is not logits:
                dlogits[rows] = d
            parts.append(stats)
            losses.append(loss)
        return TokenStats.cat(parts).where(tokens.get("live")), weighted(cat(losses), weight)

    def gradient(
        self, logits: Tensor, dlogits: Tensor, target: Tensor, normalizer: Normalizer, coefs: Coefs, head: Head
    ) -> None:  # (n, V), (n, V), (n,)
        for rows, exp in blocks(logits, self.block_rows):
            d, block_head = logits[rows], head[rows]
            _, cap_slope = shifted_(d, block_head, normalizer.shift[rows, None], with_slope=True)
            torch.exp(d.clamp_(min=FLOOR), out=exp)
            block_coefs = tuple(None if coef is None else coef[rows] for coef in coefs)
            total = normalizer.log_total[rows].exp()
            _gradient_(d, exp, total, normalizer.mean[rows], target[rows], block_coefs, block_head, cap_slope)
            if dlogits is not logits:
                dlogits[rows] = d


def blocks(logits: Tensor, block_rows: int) -> Iterator[tuple[slice, Tensor]]:  # (n, V)
    """Slices of rows, each with a scratch tensor of its shape."""
    n, vocab = logits.shape
    scratch = logits.new_empty(min(block_rows, n), vocab)
    for start in range(0, n, block_rows):
        rows = slice(start, min(start + block_rows, n))
        yield rows, scratch[: rows.stop - rows.start]


def shifted_(
    a: Tensor, head: Head, shift: Tensor | None = None, with_slope: bool = False, extras: ExtrasBuffer | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # (b, V), (b, 1), (b,)  # fmt: skip
    """Raw logits → d = z − shift in place, the shift by default the row's maximum. The target is for extras.

    Returns the shift (b, 1) and, if asked for, the slope of the cap (b, V). Extras are taken from a + b on the way.
    """
    if head.bias is not None:
        a.add_(head.bias)
    if extras is not None:
        extras.take(a, target)
    slope = head.score_(a, with_slope)
    if shift is None:
        shift = a.amax(-1, keepdim=True)
    a.sub_(shift)
    return shift, slope


def _at_target(d: Tensor, target: Tensor) -> Tensor:  # (b, V), (b,)
    """d at each row's target (b,); NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < d.shape[1])
    picked = d.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    return torch.where(inside, picked, torch.nan)


def _statistics(
    a: Tensor, exp: Tensor, target: Tensor, head: Head, extras: ExtrasBuffer | None, with_slope: bool = False
) -> tuple[TokenStats, Normalizer, Tensor, Tensor | None]:  # (b, V), (b, V), (b,)
    """(statistics, normalizer, Σ e^d (b,), slope of the soft cap if asked for) of a block of raw logits.

    Leaves e^d in `exp`, and d in place of the raw logits, without −inf where that matters.
    """
    shift, cap_slope = shifted_(a, head, with_slope=with_slope, extras=extras, target=target)
    d, shift = a, shift[:, 0]
    at_target = _at_target(d, target)
    smooth_sum = None if head.smooth is None else d @ head.smooth
    torch.exp(d, out=exp)
    total = exp.sum(-1)
    log_total = total.log()
    weighted = torch.linalg.vecdot(exp, d)
    # 0 · (−inf) is rare, and on a CPU cheaper to find than to forestall
    if d.device.type != "cpu" or weighted.isnan().any():
        weighted = torch.linalg.vecdot(exp, d.clamp_(min=FLOOR))
    mean = weighted / total
    smooth = None if smooth_sum is None else smooth_sum - head.smooth.sum() * log_total
    stats = TokenStats(at_target - log_total, log_total - mean, shift + log_total, smooth)
    if extras is not None:
        extras.normalize(head.score_, shift, log_total)
    return stats, Normalizer(shift, log_total, mean), total, cap_slope


def _gradient_(
    d: Tensor, exp: Tensor, total: Tensor, mean: Tensor, target: Tensor, coefs: Coefs, head: Head,
    cap_slope: Tensor | None,
) -> None:  # (b, V), (b, V), (b,), (b,), (b,), (b, V)  # fmt: skip
    """Overwrite d with ∂L/∂(raw logits), from p_v = e^d / total and log p_v + H = d − mean.

    ∂L/∂z_v = g(1[v=y] − p_v) − h p_v(log p_v + H) + k p_v + u(ω_v − Σω · p_v) = e^d (α + β d) + g 1[v=y] + u ω_v

    At v = y the sum is made as it stands, since α has rounded away what is left of k where g (1 − p_y) is almost 0.
    """
    g, h, k, u = (*coefs, None)[:4]
    scale = head.slope
    rest = torch.zeros_like(total)  # α without g
    if k is not None:
        rest = rest + k
    if u is not None:
        rest = rest - u * head.smooth.sum()
    if h is not None:
        rest = rest + h * mean
    alpha = rest if g is None else rest - g
    if g is not None:
        inside = (target >= 0) & (target < d.shape[1])
        place = torch.where(inside, target, 0)[:, None]
        p = exp.gather(1, place)[:, 0] / total
        slope = rest if h is None else rest - h * d.gather(1, place)[:, 0].clamp(min=FLOOR)
        at_target = torch.where(inside, (g * (1 - p) + p * slope) * scale, torch.nan)
    if h is None:
        torch.mul(exp, (alpha / total * scale)[:, None], out=d)
    else:
        d.mul_((-h / total * scale)[:, None]).add_((alpha / total * scale)[:, None]).mul_(exp)
    if g is not None:
        d.scatter_(1, place, at_target[:, None])
    if u is not None:
        d.addcmul_((u * scale)[:, None], head.smooth)
    if cap_slope is not None:
        d.mul_(cap_slope)
