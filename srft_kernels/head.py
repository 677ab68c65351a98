"""What turns a matrix product into the logits z that a token is scored on: bias, scale, soft cap, temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """z = cap · tanh(s (a + b) / cap) / T for the raw products a = x Wᵀ; without a cap z = s (a + b) / T.

    bias          b (V,), or None
    scale         s > 0 (Cohere; 1 / s in Granite)
    softcap       cap > 0, or None (Gemma)
    temperature   T > 0, or (n,) one of each of the rows at hand
    smooth        class weights ω (V,) of the statistic Σ_v ω_v log p_v, or None where nobody reads it

    The vectors are fp32 (fp64 for fp64), and those over V `aligned` (see rows). Every step rounds as the one of the
    formula does. Folded into cap and temperature, s would cost nothing, but cap / s and T / s, once rounded, are off
    for all logits alike: by hundredths of a nat where these are in the 100,000s.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    smooth: Tensor | None = None

    @property
    def divisor(self) -> float | Tensor | None:
        """T, (n, 1) where each row has its own; None where it is 1."""
        if isinstance(self.temperature, Tensor):
            return self.temperature[:, None]
        return None if self.temperature == 1 else self.temperature

    @property
    def slope(self) -> float | Tensor:
        """∂z/∂a but for the cap's: s / T, (n,) where each row has its own."""
        return self.scale / self.temperature

    def scored(self, a: Tensor) -> Tensor:
        """z of entries (n, k) whose a + b these are."""
        if self.scale != 1:
            a = a * self.scale
        if self.softcap is not None:
            a = self.softcap * torch.tanh(a / self.softcap)
        return a if self.divisor is None else a / self.divisor

    def rows(self, rows: slice) -> Head:
        """The same for some of the rows."""
        if isinstance(self.temperature, Tensor):
            return replace(self, temperature=self.temperature[rows])
        return self
