"""The row operations in PyTorch: any device, any floating type; the default on CPUs.

A chunk of logits (n, V) is worked through in blocks of a few rows, small enough for a core's L2 cache: every
operation below reads what the previous one left in the cache, which makes the whole row pass cost a few per cent of
the matrix products around it (on a whole chunk at a time it costs as much as one of them).

Logits are destroyed: a block becomes d = z − shift, then its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..extras import Taken
from ..head import Head
from ..tokens import Tokens, TokenStats, coefficients
from . import Normalizer

# Far below where e^d becomes exactly 0 (−104; −746 in fp64), so flooring d changes nothing but 0 · (−inf) into 0. Not
# lower: a derivative times d must stay finite to be silenced.
FLOOR = -1e4


def statistics(
    logits: Tensor, target: Tensor, head: Head, block_rows: int, keep: bool = False, taken: Taken | None = None
) -> tuple[TokenStats, Normalizer]:
    """Statistics of the tokens whose raw logits (n, V) these are. `target` (n,) lies in [0, V).

    `keep`: leave the logits as they are, at the price of one more block. `taken` is to be filled, if given.
    """
    stats, normalizers = [], []
    spare = logits.new_empty(min(block_rows, len(logits)), logits.shape[1]) if keep else None
    for rows, exp in _blocks(logits, block_rows):
        a = logits[rows] if spare is None else spare[: len(exp)].copy_(logits[rows])
        of_rows, look = head.rows(rows), None if taken is None else taken.rows(rows)
        d, shift, _ = _shifted_(a, of_rows, look=look and partial(look.take, target=target[rows]))
        block_stats, total, mean = _statistics(d, exp, shift, target[rows], of_rows)
        stats.append(block_stats)
        normalizers.append(Normalizer(shift[:, 0], total.log(), mean))
        if look is not None:
            look.settle(of_rows.scored, shift[:, 0], normalizers[-1].log_total)
    return _joined(stats), Normalizer(*(torch.cat(fields) for fields in zip(*normalizers)))


def loss_and_gradient(
    logits: Tensor,
    tokens: Tokens,
    weight: Tensor,
    objective: Any,
    head: Head,
    block_rows: int,
    dtype: torch.dtype,
    taken: Taken | None = None,
) -> tuple[TokenStats, Tensor, Tensor]:
    """One pass: statistics, loss per token (n,), and ∂(Σ weight·loss)/∂(raw logits) (n, V) as `dtype`.

    The gradient is written over the logits. `taken` is to be filled, if given.
    """
    parts, losses = [], []
    for rows, exp in _blocks(logits, block_rows):
        of_rows, look = head.rows(rows), None if taken is None else taken.rows(rows)
        d, shift, cap_slope = _shifted_(
            logits[rows], of_rows, with_slope=True, look=look and partial(look.take, target=tokens.target[rows])
        )
        stats, total, mean = _statistics(d, exp, shift, tokens.target[rows], of_rows)
        if look is not None:
            look.settle(of_rows.scored, shift[:, 0], total.log())
        loss, coefs = coefficients(objective, stats, tokens.rows(rows), weight[rows])
        _gradient_(d, exp, total, mean, tokens.target[rows], coefs, of_rows, cap_slope)
        parts.append(stats)
        losses.append(loss)
    return _joined(parts), torch.cat(losses), logits.to(dtype)


def gradient(
    logits: Tensor,
    target: Tensor,
    normalizer: Normalizer,
    coefs: tuple[Tensor | None, ...],
    head: Head,
    block_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Second pass: the gradient (n, V) from recomputed logits and ∂L/∂(each statistic) (n,), over the logits."""
    for rows, exp in _blocks(logits, block_rows):
        of_rows = head.rows(rows)
        d, _, cap_slope = _shifted_(logits[rows], of_rows, normalizer.shift[rows, None], with_slope=True)
        torch.exp(d.clamp_(min=FLOOR), out=exp)
        block_coefs = tuple(None if coef is None else coef[rows] for coef in coefs)
        total = normalizer.log_total[rows].exp()
        _gradient_(d, exp, total, normalizer.mean[rows], target[rows], block_coefs, of_rows, cap_slope)
    return logits.to(dtype)


def _blocks(logits: Tensor, block_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with a scratch tensor of its shape."""
    n, vocab = logits.shape
    scratch = logits.new_empty(min(block_rows, n), vocab)
    for start in range(0, n, block_rows):
        rows = slice(start, min(start + block_rows, n))
        yield rows, scratch[: rows.stop - rows.start]


def _joined(parts: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat(fields) for fields in zip(*(part.fields() for part in parts))))


def _shifted_(
    a: Tensor,
    head: Head,
    shift: Tensor | None = None,
    with_slope: bool = False,
    look: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Raw logits a (b, V) → d = z − shift in place, with shift (b, 1), by default the row's maximum.

    Third comes the slope of the soft cap, 1 − tanh² (b, V), if asked for: made here, because what d has rounded away
    is what matters where the cap saturates. `look` is shown a + b on the way.
    """
    slope = None
    if head.bias is not None:
        a.add_(head.bias)
    if look is not None:
        look(a)
    if head.scale != 1:
        a.mul_(head.scale)
    if head.softcap is not None:
        a.div_(head.softcap).tanh_()
        slope = 1 - a * a if with_slope else None
        a.mul_(head.softcap)
    if (divisor := head.divisor) is not None:
        a.div_(divisor)
    if shift is None:
        shift = a.amax(-1, keepdim=True)
    return a.sub_(shift), shift, slope


def _at_target(d: Tensor, target: Tensor) -> Tensor:
    """d (b, V) at each row's target (b,); NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < d.shape[1])
    picked = d.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    return torch.where(inside, picked, torch.nan)


def _statistics(d: Tensor, exp: Tensor, shift: Tensor, target: Tensor, head: Head) -> tuple[TokenStats, Tensor, Tensor]:
    """(statistics, Σ e^d, Σ p·d) of a block; leaves e^d in `exp`, and d without −inf where that matters."""
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
    return TokenStats(at_target - log_total, log_total - mean, shift[:, 0] + log_total, smooth), total, mean


def _gradient_(
    d: Tensor,
    exp: Tensor,
    total: Tensor,
    mean: Tensor,
    target: Tensor,
    coefs: tuple[Tensor | None, ...],
    head: Head,
    cap_slope: Tensor | None,
) -> None:
    """Overwrite d (b, V) with ∂L/∂(raw logits), from p_v = e^d / total and log p_v + H = d − mean.

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
