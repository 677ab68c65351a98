"""What turns a matrix product into the logits z that a token is scored on: bias, soft cap, temperature."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """z = cap · tanh((a + b) / cap) / T for the raw products a = x Wᵀ; without a cap z = (a + b) / T.

    bias          b (V,), or None
    softcap       cap > 0, or None (Gemma)
    temperature   T > 0
    smooth        class weights ω (V,) of the statistic Σ_v ω_v log p_v, or None where nobody reads it

    The vectors are fp32 (fp64 for fp64) and `aligned` (see rows).
    """

    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    smooth: Tensor | None = None
