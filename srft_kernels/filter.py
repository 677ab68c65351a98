"""The filtered backward: both backward products on the columns of ∂L/∂a that matter.

After softmax nearly all of ∂L/∂a (n, V) lies in few columns: the targets' and the likely tokens'. Per group of tokens

    kept      the K columns of largest norm: two dense products over K columns instead of V
    the tail  dropped from dW; in dx its sum stays, along one direction: each token's tail mass times the tail's mean
              head row, w̄ = Σ_v q_v W_v / Σ_v q_v with q_v the norm of the tail's column v

A tail's columns are small one by one but have the same sign, so that what they add to dx does not average out; its one
direction is most of it (on the hidden states of a language model it takes dx's error down sevenfold and more).

Both errors are known: the norm of what dW lacks exactly, dx's on sampled tokens, whose full tails cost no more than one
more read of the head. Where either passes the user's bound, the group's dropped columns are multiplied after all. On
an accelerator that decision stays on the device (rows/triton_residual.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import HeadProducts
from .plan import SAMPLE, Filter, runs_triton

SMALLEST = 1e-25  # sum of squares of a group: of a smaller one fp32 may have lost what the tail adds


class Filtered:
    """The two backward products of one group, as those of HeadProducts, for ∂L/∂a (n, V) split in place.

    kept      (K,) columns, ascending; `values` (n, K) are theirs; the group's own memory holds 0 there: the residual
    squares   (4,) dropped and whole: of ∂L/∂a, then of the sampled tokens' dx; what is done densely drops nothing
    """

    def __init__(self, products: HeadProducts, dlogits: Tensor, filter: Filter):  # (n, V)
        self.products, self.bound = products, filter.max_relative_error**2
        squares = column_squares(dlogits, products.dtype)
        self.kept = squares.topk(max(1, round(filter.columns * len(squares))), sorted=False).indices.sort().values
        self.values = dlogits.index_select(1, self.kept)
        dlogits.index_fill_(1, self.kept, 0)
        self.tail = squares.index_fill(0, self.kept, 0)
        self.squares = squares.new_zeros(4)
        self.dense = self._decide(0, self.tail.sum(), squares.sum())

    def input_gradient(self, residual: Tensor) -> Tensor:  # (n, V)
        products, weight = self.products, self.products.weight
        dx = products.product(self.values, weight[self.kept])
        share = self.tail.sqrt()
        share = (share / share.amax().clamp(min=torch.finfo(share.dtype).tiny)).to(products.compute)
        step = max(1, len(residual) // SAMPLE)
        of_tail = products.product(torch.cat([share[None], residual[::step]]), weight)
        mean, sampled = of_tail[:1] / share.sum(dtype=of_tail.dtype).clamp(min=1), of_tail[1:]
        mass = residual.sum(1, keepdim=True, dtype=products.dtype)  # (n, 1)
        missing = sampled - mass[::step] * mean
        dense = self._decide(2, missing.square().sum(), (dx[::step] + sampled).square().sum())
        dx.addmm_(torch.where(dense, 0, mass), mean)
        return self._add_if(dense, dx, residual, weight)

    def add_weight_gradient(self, total: Tensor, residual: Tensor, x: Tensor, first: bool) -> None:
        """total (V, H), zeros at first, += (∂L/∂a (n, V))ᵀ x (n, H)."""
        part = total.new_empty(len(self.kept), x.shape[1])
        self.products.add_weight_gradient(part, self.values, x, first=True)
        total.index_add_(0, self.kept, part)
        self._add_if(self.dense, total, residual.t(), x)

    def _decide(self, place: int, dropped: Tensor, whole: Tensor) -> Tensor:  # (), ()
        """Whether a product has to be dense, () boolean; keeps account. It has to where squares cannot tell: sums that
        are not finite, or so small that addends may be lost below the type's normal numbers."""
        known = whole.isfinite() & (whole > SMALLEST)
        dense = ~(known & (dropped <= self.bound * whole))
        self.squares[place], self.squares[place + 1] = torch.where(dense, 0, dropped), whole
        return dense

    def _add_if(self, dense: Tensor, total: Tensor, a: Tensor, b: Tensor) -> Tensor:  # (), (m, n), (m, k), (k, n)
        """total += a · b where `dense` holds."""
        if runs_triton(total.device, total.dtype):
            from .rows.triton_residual import add_product_

            return add_product_(total, a, b, dense)
        return total.add_(torch.mm(a, b)) if dense else total  # asks the device


def column_squares(a: Tensor, dtype: torch.dtype) -> Tensor:  # (n, V)
    """Σ_t a_tv² (V,) in `dtype`."""
    if a.device.type != "cpu":
        return torch.linalg.vector_norm(a, dim=0, dtype=dtype).square()
    total = a.new_zeros(a.shape[1], dtype=dtype)  # there vector_norm is ten times slower along this dimension
    for block in a.split(8):
        total += (block * block).sum(0, dtype=dtype)
    return total
