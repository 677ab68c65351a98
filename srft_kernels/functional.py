"""The public functions: check, flatten, pack the rows, choose a plan, run.

linear_loss           any objective; one pass where a token's loss is its own business
linear_logprobs       token statistics, differentiable
linear_cross_entropy  drop-in for torch.nn.functional.linear_cross_entropy
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .engine import Call, OnePass, Statistics, weighted_loss
from .extras import Extras
from .objectives import CrossEntropy
from .output import LossOutput
from .plan import Plan
from .prepare import Arguments, Tensors
from .tokens import TokenStats, per_token_loss


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
    ignore_index: int | None = -100,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    token_weight: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    is_demo: Tensor | None = None,
    weight_grad: Tensor | None = None,
    plan: Plan | None = None,
    extras: Extras | None = None,
    group: ProcessGroup | None = None,
    token_group: ProcessGroup | None = None,
    **annotations: Tensor | None,
) -> LossOutput:
    """Σ_t token_weight_t · objective_t of the distributions softmax(input · linear_weightᵀ), without their logits.

    Args:
        input: hidden states (..., H); fp32, bf16, fp16, or fp64 (PyTorch rows only). Never modified.
        linear_weight: head (V, H), of the same type unless autocast is on.
        target: token ids (...), integers in [0, vocab_size) or `ignore_index`.
        objective: `CrossEntropy`, `PolicyGradient`, `SRFT`, a preset, or any callable (stats, tokens) -> losses (n,).
            A callable is shown a slice of the tokens at a time; give it an attribute `token_local = False` if a token's
            loss depends on other tokens.
        linear_bias: (V,), or None; −inf bans a token (not under a soft cap, which comes after it).
        temperature: T > 0 of softmax(z / T), or a tensor of them shaped like target, not differentiated to. On CUDA a
            token's T that is not positive yields NaN in its outputs.
        softcap: cap > 0 of cap · tanh(z / cap), before the temperature; or None.
        logit_scale: s > 0, times the logits before the cap: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`.
        ignore_index: targets with this value take no part and cost nothing; None: there are none.
        vocab_size: the true vocabulary where the head has padding rows: those past it do not exist.
        live_tokens: no more tokens than this are live, as the host knows from making the batch. On a GPU ignored tokens
            beyond this number cost nothing; without it each costs as much as a live one, since counting them would
            stall the stream (`Plan(compact=True)` counts). On a CPU they never cost anything.
        token_weight: (...), default 1 / (number of live tokens). See `token_mean`, `sequence_mean`, `constant_length`.
        advantages, old_logprobs, ref_logprobs, is_demo, **annotations: what the objective reads, shaped like target.
            The loss is not differentiated to them, nor to anything else that the objective holds.
        weight_grad: fp32 (V, H), a master gradient that ∂loss/∂linear_weight is added to, in place and unrounded;
            `linear_weight.grad` then gets nothing. In one pass that happens in the call itself, so the loss must reach
            backward as it is, with every factor (accumulation steps, loss scale) in token_weight.
        plan: how to run; default `Plan.choose(...)`.
        extras: an `Extras`: ranks, arg-max (with "accuracy" among the metrics), top-k and candidates to tell besides.
        group: ranks that the head is divided over, each with its own consecutive rows of linear_weight (and of
            linear_bias) in the order of the ranks. All of them pass the same hidden states, targets and options;
            vocab_size then counts the whole vocabulary. Each gets the same loss, the whole gradient to input, and that
            to its rows.
        token_group: ranks that the tokens of the batch are divided over: the default token_weight then counts the live
            tokens of all of them, and losses and gradients have to be summed over these ranks, not averaged.

    Returns:
        LossOutput. With no live token the loss is exactly 0, and so are its gradients.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what was expected, before any work. On CUDA an
        out-of-range target yields NaN in that token's outputs instead, and more live tokens than `live_tokens` NaN
        everywhere; SRFT_KERNELS_CHECK=1 raises there too.
    """
    checks.objective(objective)
    given = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "is_demo": is_demo}
    arguments = Arguments(
        input,
        linear_weight,
        target,
        objective,
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        live_tokens=live_tokens,
        token_weight=token_weight,
        annotations={name: value for name, value in {**given, **annotations}.items() if value is not None},
        weight_grad=weight_grad,
        plan=plan,
        extras=extras,
        group=group,
        token_group=token_group,
    )
    if torch.compiler.is_compiling():
        from . import compiled  # takes seconds, and nobody else needs it

        return compiled.linear_loss(arguments)
    return loss_of(arguments)


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    plan: Plan | None = None,
    extras: Extras | None = None,
    group: ProcessGroup | None = None,
) -> TokenStats:
    """Log-probability of each target, entropy (nats) and logsumexp of its distribution, without the logits.

    Arguments as in `linear_loss`. Returns TokenStats with fields shaped like target, fp32 (fp64 for fp64 inputs), 0 at
    ignored tokens, differentiable through every field: the logits are recomputed in the backward (8NHV in all). Under
    `torch.no_grad()` this is the scoring pass (2NHV) for old and reference log-probs. `extras` comes as the field
    `extras` of the result, detached: for a derivative to another token's log-prob, call with that token as target.
    """
    arguments = Arguments(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        live_tokens=live_tokens,
        plan=plan,
        extras=extras,
        group=group,
    )
    if torch.compiler.is_compiling():
        from . import compiled  # takes seconds, and nobody else needs it

        return compiled.linear_logprobs(arguments)
    return statistics_of(arguments)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    plan: Plan | None = None,
    group: ProcessGroup | None = None,
    token_group: ProcessGroup | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits; arguments as in PyTorch.

    Args beyond `linear_loss`'s:
        weight: (V,) weight of each class, or None; divided like linear_weight's rows where a `group` shares them.
        reduction: "mean" (over live tokens, by class weight where given), "sum", or "none": losses shaped like target.
        label_smoothing: ε in [0, 1].
        options: PyTorch's chunking options, accepted and ignored: this function always works in chunks (see `plan`).
        z_loss: c: adds c · lse² to each token's loss.

    Returns the loss in fp32 (fp64 for fp64 inputs). Unlike PyTorch, the mean over no live token is 0, not NaN.
    """
    checks.reduction(reduction)
    if options is not None and plan is not None:
        raise ValueError("options and plan were both given: options is ignored, so drop it")
    arguments = Arguments(
        input,
        linear_weight,
        target,
        CrossEntropy(label_smoothing=label_smoothing, z_loss=z_loss),  # by name: torch 2.11 cannot trace it otherwise
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=-100 if ignore_index is None else ignore_index,  # as PyTorch does
        vocab_size=vocab_size,
        live_tokens=live_tokens,
        class_weight=weight,
        reduction=reduction,
        plan=plan,
        group=group,
        token_group=token_group,
    )
    if torch.compiler.is_compiling():
        from . import compiled  # takes seconds, and nobody else needs it

        return compiled.linear_cross_entropy(arguments)
    return cross_entropy_of(arguments)


def loss_of(a: Arguments) -> LossOutput:
    tensors, call, spread = a.prepared()
    loss, stats = _weighted_loss(tensors, call)
    extras = call.taken and call.taken.settled(stats)
    rows = call.rows
    return LossOutput.of(loss, stats, rows.tokens, a.objective, spread, call.filtered, extras, rows.weight)


def statistics_of(a: Arguments) -> TokenStats:
    tensors, call, spread = a.prepared()
    stats = _statistics(tensors, call)
    return replace(stats.map(spread), extras=call.taken and call.taken.settled(stats).map(spread))


def cross_entropy_of(a: Arguments) -> Tensor:
    tensors, call, spread = a.prepared()
    if a.reduction == "none":  # each token's upstream gradient is known only in the backward
        stats = _statistics(tensors, call)
        return spread(per_token_loss(call.objective, stats, call.rows.tokens))
    return _weighted_loss(tensors, call)[0]


def _weighted_loss(tensors: Tensors, call: Call) -> tuple[Tensor, TokenStats]:
    """(Σ weight · loss, statistics) in one pass where gradients are wanted and the plan says so, else in two."""
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if call.plan.passes == 1 and torch.is_grad_enabled() and differentiable:
        loss, *fields = OnePass.apply(*tensors, call)
        return loss, TokenStats(*fields)
    stats = _statistics(tensors, call)
    return weighted_loss(call.objective, stats, call.rows), stats


def _statistics(tensors: Tensors, call: Call) -> TokenStats:
    return TokenStats(*Statistics.apply(*tensors, call))
