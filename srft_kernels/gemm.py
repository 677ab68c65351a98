"""The three matrix products of a loss head, with fp32 results from inputs of any type.

16-bit inputs are multiplied at their own rate where the device can return fp32 (`mixes`); elsewhere they are widened
first: the head once per call (V·H fp32 numbers), the hidden states chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadProducts:
    """Matrix products with one head weight W (V, H).

    compute  the type that operands are multiplied in: the inputs' type, or fp32 where widened
    dtype    the type of logits and of accumulated gradients: fp32, or fp64 for fp64 inputs
    """

    def __init__(self, weight: Tensor, compute: torch.dtype):
        self.dtype = accumulation_dtype(compute)
        self.mixed = mixes(weight.device, compute)
        self.compute = compute if self.mixed else self.dtype
        self.weight = weight.to(self.compute)

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states (n, H) as the products take them."""
        return x.to(self.compute)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """x Wᵀ (n, V) into `out`."""
        if self.mixed:
            return torch.ops.aten.mm.dtype_out(x, self.weight.t(), self.dtype, out=out)
        return torch.mm(x, self.weight.t(), out=out)

    def input_gradient(self, dlogits: Tensor, rounded: bool = True) -> Tensor:
        """∂L/∂x = ∂L/∂a · W (n, H), in the operands' type: each row is complete, so it is rounded once.

        Not `rounded`, in the logits' type: a part of a sum over ranks, or scaled.
        """
        return torch.mm(dlogits, self.weight) if rounded else self.product(dlogits, self.weight)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b of operands in their type, in the logits' type."""
        return torch.ops.aten.mm.dtype(a, b, self.dtype) if self.mixed else torch.mm(a, b)

    def add_weight_gradient(self, total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
        """total (V, H) += (∂L/∂a)ᵀ x; on the first chunk `total` is only written.

        `total` is fp32 whatever the inputs; of the inputs' type where there is one chunk: the product itself sums in
        fp32 and rounds once.
        """
        if self.mixed and total.dtype == self.dtype:
            beta = 0 if first else 1
            torch.ops.aten.addmm.dtype_out(total, dlogits.t(), x, self.dtype, beta=beta, out=total)
        elif first:
            torch.mm(dlogits.t(), x, out=total)
        else:
            total.addmm_(dlogits.t(), x)


def mixes(device: torch.device, compute: torch.dtype) -> bool:
    """Whether 16-bit operands give fp32 results as they are: torch need not have such products but on CUDA."""
    return device.type == "cuda" and compute != accumulation_dtype(compute)


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32
