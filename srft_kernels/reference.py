"""The specification: the same functions with full logits and plain autograd, in any floating type (fp64 for tests).

Nothing here is chunked, fused or careful about memory. What the rest of the package computes is what this computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional import LossOutput
from .tokens import Tokens, TokenStats


def logits(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """z (..., V): bias, then soft cap, then temperature; rows of the head past `vocab_size` do not exist."""
    bias = None if linear_bias is None else linear_bias[:vocab_size]
    z = torch.nn.functional.linear(input, linear_weight[:vocab_size], bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_stats(z: Tensor, target: Tensor) -> TokenStats:
    """(ℓ, H, lse) of tokens with logits z (n, V) and targets (n,); `smooth` is the mean of log p over the entries."""
    logp = z.log_softmax(-1)
    # a banned token (logit −inf) adds 0 to H, and gets no gradient from it
    entropy = -(logp.exp() * logp.masked_fill(z == -torch.inf, 0)).sum(-1)
    # not torch.logsumexp, whose gradient e^{z − lse} is wrong where logits are so large that lse rounds to the maximum
    shift = z.detach().amax(-1, keepdim=True)
    lse = shift[:, 0] + (z - shift).exp().sum(-1).log()
    return TokenStats(logp.gather(1, target[:, None])[:, 0], entropy, lse, logp.mean(-1))


def linear_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, ignore_index: int = -100, **head: Any
) -> TokenStats:
    """`srft_kernels.linear_logprobs` with full logits."""
    live = target != ignore_index
    stats = token_stats(logits(input[live], linear_weight, **head), target[live])
    return TokenStats(*(_spread(field, live) for field in stats.fields()[:3]))


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    objective: Any,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    plan: Any = None,
    **annotations: Tensor | None,
) -> LossOutput:
    """`srft_kernels.linear_loss` with full logits: the same arguments (`plan` is ignored) and the same output."""
    live = target != ignore_index
    z = logits(
        input[live],
        linear_weight,
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    stats = token_stats(z, target[live])
    tokens = Tokens(target[live], **{name: a[live] for name, a in annotations.items() if a is not None})
    loss = objective(stats, tokens)
    loss = loss.sum() / max(len(loss), 1) if token_weight is None else (loss * token_weight[live]).sum()
    return LossOutput.of(loss, stats, tokens, objective, lambda field: _spread(field, live))


def _spread(field: Tensor, live: Tensor) -> Tensor:
    return field.new_zeros(live.shape).masked_scatter(live, field)
