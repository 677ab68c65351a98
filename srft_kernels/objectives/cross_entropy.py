"""Cross-entropy on demonstrations, and what is made of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import checks
from .objective import Terms, Tokens, TokenStats
from .ratios import silenced


@checks.options
@dataclass(frozen=True, repr=False)
class CrossEntropy(Terms, twin="srft_kernels.rows.triton_objectives:cross_entropy"):
    """−ℓ, optionally label-smoothed, with a z-loss, or weighted by the token's own probability.

    label_smoothing       ε: (1 − ε)(−ℓ) − ε Σ_v ω_v log p_v, with ω_v = 1/V (or class weights over V)
    z_loss                c: + c·lse² (PaLM, arXiv 2204.02311)
    probability_weighted  −sg(p)·ℓ (DFT, arXiv 2508.05629)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    probability_weighted: bool = False

    learns_from = ("demonstrations",)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], found {self.label_smoothing}")

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        loss = -stats.logprobs
        if self.probability_weighted:
            loss = silenced(stats.logprobs.detach().exp(), loss)
        if (class_weight := tokens.get("class_weight")) is not None:  # of the target's class
            loss = silenced(class_weight, loss)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * stats.smooth
        if self.z_loss:
            loss = loss + self.z_loss * stats.logsumexp.square()
        return loss
