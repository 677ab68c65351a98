"""A head: the three matrix products with its weight, and what turns a product into the logits z of a token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a logits buffer start at multiples of this many numbers, so that loads are 16 bytes wide for any vocabulary.
ROW_ALIGNMENT = 16


class Numbers(NamedTuple):
    """The numbers that logits are scored with, all rows alike; None for what changes nothing."""

    scale: float | None
    softcap: float | None
    temperature: float | None


@dataclass(frozen=True)
class Head:
    """z = cap · tanh(s (a + b) / cap) / T for the raw products a = x Wᵀ; without a cap z = s (a + b) / T.

    bias          b (V,), or None
    scale         s > 0 (Cohere; 1 / s in Granite)
    softcap       cap > 0, or None (Gemma)
    temperature   T > 0, or (n,) one of each of the rows at hand
    smooth        class weights ω (V,) of the statistic Σ_v ω_v log p_v, or None where nobody reads it

    The vectors are fp32 (fp64 for fp64), and those over V `aligned`. Every step rounds as the one of the formula does.
    Folded into cap and temperature, s would cost nothing, but cap / s and T / s, once rounded, are off for all logits
    alike: by hundredths of a nat where these are in the 100,000s.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    smooth: Tensor | None = None

    @property
    def numbers(self) -> Numbers:
        """None for the temperature too where each row has its own."""
        temperature = None if isinstance(self.temperature, Tensor) or self.temperature == 1 else float(self.temperature)
        return Numbers(None if self.scale == 1 else self.scale, self.softcap, temperature)

    @property
    def slope(self) -> float | Tensor:
        """∂z/∂a but for the cap's: s / T, (n,) where each row has its own."""
        return self.scale / self.temperature

    def score_(self, a: Tensor, with_slope: bool = False) -> Tensor | None:  # (n, k)
        """a + b of some entries → z, in place. Returns the slope of the soft cap (n, k), 1 − tanh², if asked for: z has
        rounded away what matters where the cap saturates."""
        scale, softcap, temperature = self.numbers
        slope = None
        if scale is not None:
            a.mul_(scale)
        if softcap is not None:
            a.div_(softcap).tanh_()
            slope = 1 - a * a if with_slope else None
            a.mul_(softcap)
        if isinstance(self.temperature, Tensor):
            a.div_(self.temperature[:, None])
        elif temperature is not None:
            a.div_(temperature)
        return slope

    def __getitem__(self, rows: slice) -> Head:
        """The same for some of the rows."""
        if isinstance(self.temperature, Tensor):
            return replace(self, temperature=self.temperature[rows])
        return self


class HeadProducts:
    """Matrix products with one head weight W (V, H), with fp32 results from operands of any type.

    compute  the type that operands are multiplied in: the inputs' type, or fp32 where widened
    dtype    the type of logits and of accumulated gradients: fp32, or fp64 for fp64 inputs

    16-bit operands are multiplied at their own rate where the device can return fp32 (`mixes`); elsewhere they are
    widened first: the head once per call (V·H fp32 numbers), the hidden states chunk by chunk.
    """

    def __init__(self, weight: Tensor, compute: torch.dtype):  # (V, H)
        self.dtype = accumulation_dtype(compute)
        self.mixed = mixes(weight.device, compute)
        self.compute = compute if self.mixed else self.dtype
        self.weight = weight.to(self.compute)

    def operand(self, x: Tensor) -> Tensor:  # (n, H)
        """Hidden states as the products take them."""
        return x.to(self.compute)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:  # (n, H), (n, V)
        """x Wᵀ into `out`."""
        if self.mixed:
            return torch.ops.aten.mm.dtype_out(x, self.weight.t(), self.dtype, out=out)
        return torch.mm(x, self.weight.t(), out=out)

    def input_gradient(self, dlogits: Tensor) -> Tensor:  # (n, V)
        """∂L/∂x = ∂L/∂a · W (n, H) in the logits' type, to be rounded once: in a 16-bit product over so many columns
        cuBLAS may round the parts of its sum."""
        return self.product(dlogits, self.weight)

    def product(self, a: Tensor, b: Tensor) -> Tensor:  # (m, k), (k, n)
        """a · b of operands in their type, in the logits' type."""
        return torch.ops.aten.mm.dtype(a, b, self.dtype) if self.mixed else torch.mm(a, b)

    def add_weight_gradient(self, total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
        """total (V, H) += (∂L/∂a (n, V))ᵀ x (n, H); on the first group `total` is only written.

        `total` is fp32 whatever the inputs; of the inputs' type where there is one group: the product itself sums in
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


def rows_of(x: Tensor, rows: slice) -> Tensor:  # (n, ...)
    """Some of the rows; where they are all, x itself: in a small call views take as long as what is done with them."""
    all_of_them = rows.step is None and not rows.start and (rows.stop is None or rows.stop >= x.shape[0])
    return x if all_of_them else x[rows]


def flat(column: Tensor) -> Tensor:  # (...)
    """(N,), contiguous."""
    return column.contiguous() if column.dim() == 1 else column.reshape(-1).contiguous()


def aligned_size(vocab: int) -> int:
    """Numbers that a row of `vocab` takes up in memory."""
    return -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def aligned(vector: Tensor, dtype: torch.dtype) -> Tensor:  # (V,)
    """A copy that can be read, as zeros, up to its aligned size."""
    room = vector.new_zeros(aligned_size(len(vector)), dtype=dtype)[: len(vector)]
    return room.copy_(vector)
