"""Row operations: what is done to each row of a chunk's logits, in PyTorch, in Triton, or for a divided head.

Whoever offers them is a `RowOps`. They know heads and objectives, and nothing of chunks, plans or autograd.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..extras import ExtrasBuffer
from ..head import Head
from ..objectives.objective import Objective, Tokens, TokenStats, differentiate, weighted


class Normalizer(NamedTuple):
    """p_v = e^{d_v − log_total} with d = z − shift: a row's maximum, log Σ e^d, and Σ p·d, each (n,).

    Kept apart because their sums, the logsumexp and the entropy log_total − mean, have rounded away what the gradient
    needs: p where logits are huge, and log p + H = d − mean.
    """

    shift: Tensor
    log_total: Tensor
    mean: Tensor


Coefs = tuple[Tensor | None, ...]  # ∂L/∂(each statistic), (n,) or None where there is none: g, h, k and, smoothed, u


class RowOps(Protocol):
    """Of n rows of raw logits a = x Wᵀ (n, V), fp32 or fp64, at aligned addresses (see `Call.logits_buffer`).

    extras   to be filled on the way, if given
    dlogits  (n, V), where ∂L/∂a goes: the logits themselves, or another buffer in any type, its rows padded alike
    """

    def statistics(
        self, logits: Tensor, target: Tensor, head: Head, extras: ExtrasBuffer | None = None
    ) -> tuple[TokenStats, Normalizer]:  # (n, V), (n,)
        """Statistics, NaN for a target out of range, and what the second pass needs of them; the logits stay."""

    def loss_and_gradient(
        self, logits: Tensor, dlogits: Tensor, tokens: Tokens, weight: Tensor, objective: Objective, head: Head,
        extras: ExtrasBuffer | None = None,
    ) -> tuple[TokenStats, Tensor]:  # (n, V), (n, V), (n,)  # fmt: skip
        """One pass: (statistics, weight · losses (n,)) and ∂(Σ weight·loss)/∂a of an objective that is token-local.

        What is returned of a dead token (tokens.live) is 0.
        """

    def gradient(
        self, logits: Tensor, dlogits: Tensor, target: Tensor, normalizer: Normalizer, coefs: Coefs, head: Head
    ) -> None:  # (n, V), (n, V), (n,)
        """Second pass: ∂L/∂a from logits made again."""


def in_three_steps(
    rows: RowOps, logits: Tensor, dlogits: Tensor, tokens: Tokens, weight: Tensor, objective: Objective, head: Head,
    extras: ExtrasBuffer | None = None,
) -> tuple[TokenStats, Tensor]:  # (n, V), (n, V), (n,)  # fmt: skip
    """`loss_and_gradient` made of the other two, with the objective between them, which is shown all rows at once."""
    stats, normalizer = rows.statistics(logits, tokens.target, head, extras)
    loss, coefs = differentiate(objective, stats, tokens, weight)
    rows.gradient(logits, dlogits, tokens.target, normalizer, coefs, head)
    return stats.where(tokens.get("live")), weighted(loss, weight)
