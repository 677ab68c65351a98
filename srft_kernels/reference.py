"""The specification: the same functions with full logits and plain autograd, in any floating type (fp64 for tests).

Nothing here is chunked, fused or careful about memory. What the rest of the package computes is what this computes.
"""

from __future__ import annotations

import inspect
from math import log
from typing import Any

import torch
from torch import Tensor

from . import functional
from .call import Arguments, HeadArguments
from .distillation.engine import DistillationArguments, DistillationOutput
from .objectives.objective import Tokens, TokenStats, annotation
from .output import LossOutput, Metrics


def logits(
    input: Tensor,  # (..., H)
    linear_weight: Tensor,  # (V, H)
    *,
    linear_bias: Tensor | None = None,  # (V,)
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


def token_stats(z: Tensor, target: Tensor) -> TokenStats:  # (n, V), (n,)
    """(ℓ, H, lse) of tokens with logits z; `smooth` is the mean of log p over the entries."""
    logp = z.log_softmax(-1)
    # a banned token (logit −inf) adds 0 to H, and gets no gradient from it
    entropy = -(logp.exp() * logp.masked_fill(z == -torch.inf, 0)).sum(-1)
    # not torch.logsumexp, whose gradient e^{z − lse} is wrong where logits are so large that lse rounds to the maximum
    shift = z.detach().amax(-1, keepdim=True)
    lse = shift[:, 0] + (z - shift).exp().sum(-1).log()
    return TokenStats(logp.gather(1, target[:, None])[:, 0], entropy, lse, logp.mean(-1))


def linear_logprobs(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> TokenStats:  # see there
    """`srft_kernels.linear_logprobs` with full logits; of its options those of the head and of the targets."""
    for name in options.keys() - inspect.signature(functional.linear_logprobs).parameters:
        raise TypeError(f"linear_logprobs() got an unexpected keyword argument {name!r}")
    a = _arguments(input=input, linear_weight=linear_weight, target=target, **options)
    target, live = _target_and_live(a)
    stats = token_stats(_logits(a, live, a.vocab_size), target[live])
    return TokenStats(*(_spread(field, live) for field in stats.fields()[:3]))


def linear_loss(input: Tensor, linear_weight: Tensor, target: Tensor, objective: Any, **options: Any) -> LossOutput:
    """`srft_kernels.linear_loss` with full logits: the same options and output, but for what it does not compute."""
    a = _arguments(input=input, linear_weight=linear_weight, target=target, objective=objective, **options)
    target, live = _target_and_live(a)
    stats = token_stats(_logits(a, live, a.vocab_size), target[live])
    columns = {name: annotation(name, column[live], stats.logprobs.dtype) for name, column in a.annotations.items()}
    tokens = Tokens(target[live], **columns)
    if a.token_weight is not None:
        tokens = tokens.replace(counted=a.token_weight[live] != 0)
    loss = a.objective(stats, tokens)
    loss = loss.sum() / max(len(loss), 1) if a.token_weight is None else (loss * a.token_weight[live]).sum()
    stats = stats.map(Tensor.detach)
    told = Metrics(a.objective, stats, tokens)
    return LossOutput(loss, *(_spread(field, live) for field in stats.fields()[:3]), None, told)


def linear_distillation(
    input: Tensor, linear_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, **options: Any
) -> DistillationOutput:
    """`srft_kernels.linear_distillation` with full logits: the same options and output."""
    of_teacher = {"teacher_input": teacher_input, "teacher_weight": teacher_weight}
    a = DistillationArguments.of({"input": input, "linear_weight": linear_weight, **of_teacher, **options})
    live = torch.ones(input.shape[:-1], dtype=torch.bool, device=input.device) if a.mask is None else a.mask
    p = _logits(a, live, a.vocab_size).log_softmax(-1)
    with torch.no_grad():
        q = _logits(a.teacher, live, a.vocab_size).log_softmax(-1)
    if a.divergence == "forward_kl":
        divergences = _kl(q, p)
    elif a.divergence == "reverse_kl":
        divergences = _kl(p, q)
    else:
        nowhere = (p == -torch.inf) & (q == -torch.inf)  # logaddexp has no gradient there
        m = torch.logaddexp(p.masked_fill(nowhere, 0) + log(1 - a.beta), q.masked_fill(nowhere, 0) + log(a.beta))
        divergences = a.beta * _kl(q, m) + (1 - a.beta) * _kl(p, m)
    loss = divergences.sum() / max(len(divergences), 1)
    if a.token_weight is not None:
        loss = (divergences * a.token_weight[live]).sum()
    return DistillationOutput(loss, _spread(divergences.detach(), live))


def _arguments(**passed: Any) -> Arguments:
    for name in ("weight_grad", "extras", "group", "token_group", "partial_input_grad"):
        if passed.get(name):
            raise ValueError(f"srft_kernels.reference does not compute {name}: leave it out")
    return Arguments.of(passed)


def _target_and_live(a: Arguments) -> tuple[Tensor, Tensor]:
    """Targets as int64, and which are not ignored, each (...)."""
    target, live = a.target_and_live()
    return target, torch.ones_like(target, dtype=torch.bool) if live is None else live


def _logits(a: HeadArguments, live: Tensor, vocab_size: int | None) -> Tensor:  # (...)
    """(n, V) of the live tokens."""
    options = {name: value for name, value in vars(a).items() if name in HEAD_OPTIONS}
    if isinstance(a.temperature, Tensor):
        options["temperature"] = a.temperature[live]
    return logits(a.input[live], a.linear_weight, vocab_size=vocab_size, **options)


HEAD_OPTIONS = ("linear_bias", "temperature", "softcap", "logit_scale")


def _spread(field: Tensor, live: Tensor) -> Tensor:  # (n,), (...)
    return field.new_zeros(live.shape).masked_scatter(live, field)


def _kl(p: Tensor, q: Tensor) -> Tensor:  # (n, V), (n, V)
    """KL(p ‖ q) (n,) of log-probabilities; a probability of 0 adds 0."""
    return (p.exp() * (p - q).masked_fill(p.exp() == 0, 0)).sum(-1)
