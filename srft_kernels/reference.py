"""The specification: the same functions with full logits and plain autograd, in any floating type (fp64 for tests).

Nothing here is chunked, fused or careful about memory. What the rest of the package computes is what this computes.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from .distillation import DistillationOutput
from .functional import LossOutput
from .tokens import Tokens, TokenStats


def logits(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """z (..., V): bias, scale, soft cap, temperature, in this order; head rows past `vocab_size` do not exist."""
    bias = None if linear_bias is None else linear_bias[:vocab_size]
    z = logit_scale * torch.nn.functional.linear(input, linear_weight[:vocab_size], bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


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
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    **head: Any,
) -> TokenStats:
    """`srft_kernels.linear_logprobs` with full logits."""
    live = target != ignore_index
    z = logits(input[live], linear_weight, temperature=_of(temperature, live), **head)
    stats = token_stats(z, target[live])
    return TokenStats(*(_spread(field, live) for field in stats.fields()[:3]))


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    objective: Any,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        temperature=_of(temperature, live),
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
    )
    stats = token_stats(z, target[live])
    tokens = Tokens(target[live], **{name: a[live] for name, a in annotations.items() if a is not None})
    if token_weight is not None:
        tokens = tokens.replace(counted=token_weight[live] != 0)
    loss = objective(stats, tokens)
    loss = loss.sum() / max(len(loss), 1) if token_weight is None else (loss * token_weight[live]).sum()
    return LossOutput.of(loss, stats, tokens, objective, lambda field: _spread(field, live))


def _of(temperature: float | Tensor, live: Tensor) -> float | Tensor:
    return temperature[live] if isinstance(temperature, Tensor) else temperature


def _spread(field: Tensor, live: Tensor) -> Tensor:
    return field.new_zeros(live.shape).masked_scatter(live, field)


def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    plan: Any = None,
) -> DistillationOutput:
    """`srft_kernels.linear_distillation` with full logits: the same arguments (`plan` is ignored) and output."""
    live = torch.ones(input.shape[:-1], dtype=torch.bool, device=input.device) if mask is None else mask
    student = {"linear_bias": linear_bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    teacher = {"linear_bias": teacher_bias, "temperature": teacher_temperature or temperature,
               "softcap": teacher_softcap, "logit_scale": teacher_logit_scale}  # fmt: skip
    p = logits(input[live], linear_weight, vocab_size=vocab_size, **student).log_softmax(-1)
    with torch.no_grad():
        q = logits(teacher_input[live], teacher_weight, vocab_size=vocab_size, **teacher).log_softmax(-1)
    if divergence == "forward_kl":
        found = _kl(q, p)
    elif divergence == "reverse_kl":
        found = _kl(p, q)
    else:
        nowhere = (p == -torch.inf) & (q == -torch.inf)  # logaddexp has no gradient there
        m = torch.logaddexp(p.masked_fill(nowhere, 0) + log(1 - beta), q.masked_fill(nowhere, 0) + log(beta))
        found = beta * _kl(q, m) + (1 - beta) * _kl(p, m)
    weighted = found.sum() / max(len(found), 1) if token_weight is None else (found * token_weight[live]).sum()
    return DistillationOutput(weighted, _spread(found.detach(), live))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) (n,) of log-probabilities (n, V); a probability of 0 adds 0."""
    return (p.exp() * (p - q).masked_fill(p.exp() == 0, 0)).sum(-1)
