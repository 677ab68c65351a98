"""The divergence of two rows of logits, and its gradient, in PyTorch: any device, any floating type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import Head
from ..rows.torch_rows import blocks, shifted_
from .divergence import Divergence


@dataclass(frozen=True)
class TorchDivergenceRows:
    """DivergenceRows (see divergence.py) on blocks of `block_rows` rows."""

    block_rows: int

    def divergence_and_gradient(
        self, student: Tensor, teacher: Tensor, dlogits: Tensor | None, weight: Tensor, divergence: Divergence,
        head: Head, teacher_head: Head,
    ) -> Tensor:  # (n, V), (n, V), (n, V), (n,)  # fmt: skip
        divergences = []
        for rows, scratch in blocks(student, self.block_rows):
            ds, dt = student[rows], teacher[rows]
            _, cap_slope = shifted_(ds, head, with_slope=dlogits is not None)
            shifted_(dt, teacher_head)
            es, et = torch.exp(ds, out=scratch), dt.exp()
            values, dz = KINDS[divergence.kind](ds, dt, es, et, divergence.beta)
            divergences.append(values)
            if dlogits is not None:
                silent = weight[rows] == 0  # whatever the derivative is, infinite or not
                dz.mul_((weight[rows] * head.slope)[:, None]).masked_fill_(silent[:, None], 0)
                if cap_slope is not None:
                    dz.mul_(cap_slope)
                dlogits[rows] = dz
        return torch.cat(divergences)


# Each: (divergence (b,), ∂divergence/∂z (b, V)) from d = z − max z and e = e^d of the student and of the teacher.


def _forward_kl(ds: Tensor, dt: Tensor, es: Tensor, et: Tensor, _: float) -> tuple[Tensor, Tensor]:
    s, t = es.sum(-1), et.sum(-1)
    value = _sum(et, dt.sub_(ds)) / t + (s / t).log()
    return value, es.div_(s[:, None]).sub_(et.div_(t[:, None]))


def _reverse_kl(ds: Tensor, dt: Tensor, es: Tensor, et: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """Of v = log p − log q, up to a constant, the gradient is p (v − Σ p v): the mean is taken twice, the second time
    of what the first has left over, since its rounding error would be in every column, most of all in a peaked one."""
    s, t = es.sum(-1), et.sum(-1)
    v = ds.sub_(dt)
    mean = _sum(es, v) / s
    rest = _sum(es, v.sub_(mean[:, None])) / s
    value = torch.where(mean.isinf(), mean, mean + rest) - (s / t).log()
    return value, v.sub_(rest[:, None]).mul_(es).div_(s[:, None])


def _jensen_shannon(ds: Tensor, dt: Tensor, es: Tensor, et: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """With M = (1 − β) p + β q: every ratio to it is bounded, so its logarithm needs no logits.

    Of v = log p/M, up to a constant, the gradient is (1 − β) p (v − Σ p v). As it stands v would be rounded in every
    column, and its mean once more. So v is taken less what it is where q = c p, fitted by least squares: near to that,
    as is every column that matters of a peaked row, v is as exact as it is small.
    """
    p, q = es.div_(es.sum(-1, keepdim=True)), et.div_(et.sum(-1, keepdim=True))
    mixture = torch.mul(p, 1 - beta, out=ds).add_(q, alpha=beta)
    teacher = torch.linalg.vecdot(q, _log_ratio(torch.sub(q, p, out=dt).mul_(1 - beta), torch.minimum(q, mixture)))
    c = torch.linalg.vecdot(p, q) / torch.linalg.vecdot(p, p)
    level = beta * c + (1 - beta)  # M / p where q = c p
    least = torch.minimum(p * level[:, None], mixture)
    v = _log_ratio(torch.addcmul(q, p, c[:, None], value=-1, out=mixture).mul_(-beta), least)
    mean = torch.linalg.vecdot(p, v)
    student = mean + _log_ratio(beta * (1 - c), level.clamp(max=1))
    return (1 - beta) * student + beta * teacher, v.sub_(mean[:, None]).mul_(p).mul_(1 - beta)


def _log_ratio(difference: Tensor, least: Tensor) -> Tensor:
    """log a/b from a − b and the lesser of both: of a ratio near to 1, as exact as a − b is."""
    x = difference.abs().div_(least.clamp_(min=torch.finfo(least.dtype).tiny))
    return x.log1p_().copysign_(difference)


KINDS = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jensen_shannon": _jensen_shannon}


def _sum(p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p_v values_v (b,), where p = 0 silences any value: such values are replaced by 0 if that matters."""
    total = torch.linalg.vecdot(p, values)
    # 0 · ∞ is rare, and on a CPU cheaper to find than to forestall
    if p.device.type != "cpu" or total.isnan().any():
        total = torch.linalg.vecdot(p, values.masked_fill_(p == 0, 0))
    return total
