"""What an objective sees of each token: its statistics and its annotations. Never a logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .extras import TokenExtras


@dataclass(frozen=True)
class TokenStats:
    """Statistics of n tokens under the policy, in nats; all shaped alike, fp32 (fp64 for fp64 inputs).

    logprobs   ℓ = z_y − logsumexp(z), the log-probability of the target
    entropy    H = −Σ_v p_v log p_v
    logsumexp  log Σ_v e^{z_v}
    smooth     Σ_v ω_v log p_v for class weights ω; present only when an objective smooths its labels
    extras     what else `linear_logprobs(extras=...)` was asked for; an objective sees None
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    smooth: Tensor | None = None
    extras: TokenExtras | None = None

    def fields(self) -> tuple[Tensor, ...]:
        present = (self.logprobs, self.entropy, self.logsumexp)
        return present if self.smooth is None else (*present, self.smooth)

    def map(self, function) -> TokenStats:
        return TokenStats(*(function(field) for field in self.fields()))


class Tokens:
    """Annotations of n tokens by name: `tokens.target`, `tokens.advantages`, or whatever the caller passed.

    Reading one that was not given raises a ValueError that names it; `tokens.get(name)` returns None instead.
    `live` is False at ignored tokens where some may be among these; where it is not given there are none. `counted`,
    where it is given, is False at those too and at tokens of token weight 0: averages are over the others.
    """

    def __init__(self, target: Tensor, **annotations: Tensor | None):
        self._columns = {"target": target, **{k: v for k, v in annotations.items() if v is not None}}

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):  # copy and pickle probe for these
            raise AttributeError(name)
        column = self._columns.get(name)
        if column is None:
            given = ", ".join(sorted(self._columns))
            raise ValueError(
                f"the objective reads the annotation `{name}`, which was not given (given: {given}); "
                f"pass {name}=..., a tensor shaped like target"
            )
        return column

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def get(self, name: str) -> Tensor | None:
        return self._columns.get(name)

    def averaged(self) -> Tensor | None:
        """Over which of them averages are; None: all."""
        counted = self.get("counted")
        return self.get("live") if counted is None else counted

    def rows(self, rows: slice | Tensor) -> Tokens:
        """The same annotations for some of the tokens."""
        return self.map(lambda column: column[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(**{name: function(column) for name, column in self._columns.items()})

    def replace(self, **columns: Tensor) -> Tokens:
        return Tokens(**{**self._columns, **columns})


def token_local(objective: Any, tokens: Tokens) -> bool:
    """Whether a token's loss depends on that token alone."""
    local = getattr(objective, "token_local", True)
    return local(tokens) if callable(local) else local


def crosses(objective: Any, tokens: Tokens) -> bool:
    """Whether a token's loss may have a gradient to other tokens' statistics."""
    return getattr(objective, "crosses", not token_local(objective, tokens))


def coefficients(
    objective: Any, stats: TokenStats, tokens: Tokens, weight: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Loss of n tokens and the derivative of Σ weight·loss to each of their statistics, by autograd on n-long vectors.

    This is all that a backward pass needs to know of an objective (g, h, k of the derivation; the last one, of
    `smooth`, only with label smoothing). None stands for a statistic that the objective does not depend on.
    """
    with torch.enable_grad():
        leaves = stats.map(lambda field: field.detach().requires_grad_())
        loss = per_token_loss(objective, leaves, tokens)
        if not loss.requires_grad:  # e.g. a part that is switched off
            return loss, (None,) * len(leaves.fields())
        grads = torch.autograd.grad(loss, leaves.fields(), grad_outputs=weight.to(loss.dtype), allow_unused=True)
    if not crosses(objective, tokens):
        silent = weight == 0  # whatever its derivative is, infinite or not
        grads = tuple(None if g is None else torch.where(silent, 0, g) for g in grads)
    return loss.detach(), grads


def per_token_loss(objective: Any, stats: TokenStats, tokens: Tokens) -> Tensor:
    """objective(stats, tokens), checked: a user's callable may return anything."""
    loss = objective(stats, tokens)
    expected = tuple(stats.logprobs.shape)
    if not isinstance(loss, Tensor) or tuple(loss.shape) != expected:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the objective returned {found}, expected one loss per token: a tensor of shape {expected}")
    return loss
