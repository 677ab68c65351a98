"""What `linear_loss` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .extras import TokenExtras
from .tokens import Tokens, TokenStats


@dataclass(frozen=True)
class LossOutput:
    """What `linear_loss` returns.

    loss       scalar, Σ_t token_weight_t · loss_t; differentiable
    logprobs   ℓ, shaped like target, detached; 0 where ignored
    entropy    H in nats, likewise
    metrics    token means over this call's live tokens, detached 0-d tensors; computed when first read. With no live
               token there are none, and in a graph of torch.compile, which has the outputs that it has, they are NaN
    extras     what `extras` asked for beside, else None
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    extras: TokenExtras | None = None
    _metrics: Callable[[], dict[str, Tensor]] = field(default=dict, repr=False)

    @property
    def metrics(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._metrics()

    @classmethod
    def of(
        cls,
        loss: Tensor,
        stats: TokenStats,
        tokens: Tokens,
        objective: Any,
        spread: Callable,
        filtered: Tensor | None = None,
        extras: TokenExtras | None = None,
    ) -> LossOutput:
        """From the statistics of the tokens that were worked through; `spread` gives a field the shape of target."""
        stats = stats.map(Tensor.detach)
        argmax = extras and extras.argmax
        return cls(
            loss,
            spread(stats.logprobs),
            spread(stats.entropy),
            extras and extras.map(spread),
            cache(lambda: metrics(objective, stats, tokens, filtered, argmax)),
        )


def metrics(
    objective: Any, stats: TokenStats, tokens: Tokens, filtered: Tensor | None, argmax: Tensor | None
) -> dict[str, Tensor]:
    """The objective's own, over the live tokens alone, top-1 accuracy, and what a filtered backward dropped so far."""
    if (live := tokens.get("live")) is not None:
        stats, tokens = stats.map(lambda field: field[live]), tokens.rows(live)
        argmax = argmax if argmax is None else argmax[live]
    of_objective = getattr(objective, "metrics", None)
    result = of_objective(stats, tokens) if of_objective and len(stats.logprobs) else {}
    if argmax is not None and len(argmax):
        result["accuracy"] = (argmax == tokens.target).to(stats.logprobs.dtype).mean()
    if filtered is not None:
        dropped, whole = filtered.view(2, 2).unbind(1)
        found = (dropped / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()
        result["filtered_norm"], result["filtered_dx_error"] = found  # of ∂L/∂a; of dx, on sampled tokens
    return result
