"""The public functions: check, flatten, pack the rows, choose a plan, run.

linear_loss           any objective; one pass where a token's loss is its own business
linear_logprobs       token statistics, differentiable
linear_cross_entropy  drop-in for torch.nn.functional.linear_cross_entropy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .engine import Call, OnePass, Statistics, weighted_sum
from .extras import Extras, Taken, TokenExtras
from .gemm import accumulation_dtype
from .head import Head
from .objectives import CrossEntropy
from .pack import Rows, pack, sequence_chunks, token_local
from .plan import Plan
from .rows import aligned
from .token_parallel import summed
from .tokens import Tokens, TokenStats, per_token_loss
from .vocab_parallel import Shard

Tensors = tuple[Tensor, Tensor, Tensor | None]  # x, W and the bias as autograd sees them


@dataclass(frozen=True)
class LossOutput:
    """What `linear_loss` returns.

    loss       scalar, Σ_t token_weight_t · loss_t; differentiable
    logprobs   ℓ, shaped like target, detached; 0 where ignored
    entropy    H in nats, likewise
    metrics    token means over this call's live tokens, detached 0-d tensors; computed when first read
    extras     what `extras` asked for beside, else None
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    extras: TokenExtras | None = None
    _metrics: Callable[[], dict[str, Tensor]] = field(default=dict, repr=False)

    @cached_property
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
            lambda: _metrics(objective, stats, tokens, filtered, argmax),
        )


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
    tensors, call, spread = _prepare(
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
        annotations={**given, **annotations},
        weight_grad=weight_grad,
        plan=plan,
        group=group,
        token_group=token_group,
        extras=extras,
    )
    loss, stats = _weighted_loss(tensors, call)
    extras = call.taken and call.taken.settled(stats)
    return LossOutput.of(loss, stats, call.rows.tokens, objective, spread, call.filtered, extras)


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
    tensors, call, spread = _prepare(
        input,
        linear_weight,
        target,
        None,
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        live_tokens=live_tokens,
        plan=plan,
        group=group,
        extras=extras,
    )
    stats = _statistics(tensors, call)
    return replace(stats.map(spread), extras=call.taken and call.taken.settled(stats).map(spread))


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
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', found {reduction!r}")
    if options is not None and plan is not None:
        raise ValueError("options and plan were both given: options is ignored, so drop it")
    checks.call(input, linear_weight, target, linear_bias)
    shard = _shard(group, input, linear_weight, target, vocab_size, plan)
    vocab = shard.vocab if shard else checks.vocabulary(linear_weight, vocab_size)
    ignore_index = -100 if ignore_index is None else ignore_index  # as PyTorch does
    target = target.long()
    live = target != ignore_index
    checks.target_range(target, live, vocab)
    dtype = accumulation_dtype(input.dtype)
    annotations = {}
    if weight is not None:
        checks.class_weight(weight, len(linear_weight) if shard else vocab, input)
        weight = weight.detach().to(dtype)
        if shard:
            of_target = shard.of_target(weight, target) * live
        else:  # a target out of range makes its own row NaN; here it only must not be read
            of_target = weight[torch.where(live & (target >= 0) & (target < vocab), target, 0)] * live
        annotations["class_weight"] = of_target
    token_weight = None  # 1 / live tokens
    if reduction != "mean":
        token_weight = live.to(dtype)
    elif weight is not None:
        token_weight = live / summed(of_target.sum(), token_group)
    tensors, call, spread = _prepare(
        input,
        linear_weight,
        target,
        CrossEntropy(label_smoothing, z_loss),
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        live_tokens=live_tokens,
        token_weight=token_weight,
        annotations=annotations,
        smooth_weight=weight,
        plan=plan,
        group=shard,
        token_group=token_group,
    )
    if reduction == "none":  # each token's upstream gradient is known only in the backward
        stats = _statistics(tensors, call)
        return spread(per_token_loss(call.objective, stats, call.rows.tokens))
    return _weighted_loss(tensors, call)[0]


def _metrics(
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


def _weighted_loss(tensors: Tensors, call: Call) -> tuple[Tensor, TokenStats]:
    """(Σ weight · loss, statistics) in one pass where gradients are wanted and the plan says so, else in two."""
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if call.plan.passes == 1 and torch.is_grad_enabled() and differentiable:
        loss, *fields = OnePass.apply(*tensors, call)
        return loss, TokenStats(*fields)
    stats = _statistics(tensors, call)
    return weighted_sum(per_token_loss(call.objective, stats, call.rows.tokens), call.rows.weight), stats


def _statistics(tensors: Tensors, call: Call) -> TokenStats:
    return TokenStats(*Statistics.apply(*tensors, call))


def _shard(group: ProcessGroup | Shard | None, *call: Any) -> Shard | None:
    return group if group is None or isinstance(group, Shard) else Shard.agreed(group, *call)


def _prepare(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    objective: Any,
    *,
    linear_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    vocab_size: int | None,
    live_tokens: int | None,
    token_weight: Tensor | None = None,
    annotations: dict[str, Tensor | None] | None = None,
    smooth_weight: Tensor | None = None,
    weight_grad: Tensor | None = None,
    plan: Plan | None = None,
    group: ProcessGroup | Shard | None = None,
    token_group: ProcessGroup | None = None,
    extras: Extras | None = None,
) -> tuple[Tensors, Call, Callable[[Tensor], Tensor]]:
    """((x, W, b) with x flat; the checked call on packed rows; what gives a packed field (n, ...) target's shape)."""
    compute = checks.call(input, linear_weight, target, linear_bias)
    checks.positive("softcap", softcap)
    checks.positive("logit_scale", logit_scale)
    checks.plan(plan)
    shard = _shard(group, input, linear_weight, target, vocab_size, plan)
    vocab = shard.vocab if shard else checks.vocabulary(linear_weight, vocab_size)
    here = shard.size if shard else vocab  # entries on this rank
    checks.live_tokens(live_tokens)
    checks.weight_grad(weight_grad, linear_weight, compute)
    dtype = accumulation_dtype(compute)
    annotations = {name: value for name, value in (annotations or {}).items() if value is not None}
    checks.annotations_needed(objective, annotations)
    columns = {name: checks.shaped_like_target(name, value, target) for name, value in annotations.items()}
    columns = {name: c.to(dtype) if c.is_floating_point() else c for name, c in columns.items()}
    target = target.long()  # before comparing: as uint8, −100 is 156
    live = None if ignore_index is None else target != ignore_index
    checks.target_range(target, live, vocab)
    checks.temperature(temperature, target, live)
    checks.at_most_live(live_tokens, target, live)
    checks.extras(extras, target, live, vocab, group)

    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(dtype) / logit_scale
        columns["temperature"] = torch.where(temperature > 0, temperature, torch.nan)
        temperature = logit_scale  # in its place: see Rows.head
    shape = target.shape
    # kernels read their columns one number after the other, whatever view the caller passed
    flat = {name: column.reshape(-1).contiguous() for name, column in {"target": target, **columns}.items()}
    tokens = Tokens(**flat)
    if token_weight is not None:
        token_weight = checks.shaped_like_target("token_weight", token_weight, target)
        token_weight = token_weight.reshape(-1).to(dtype).contiguous()
    elif token_group is not None:
        ones = torch.ones_like(tokens.target, dtype=dtype) if live is None else live.reshape(-1).to(dtype)
        token_weight = ones / summed(ones.sum(), token_group).clamp(min=1)
    tokens_at_most = len(tokens.target) if live_tokens is None else min(live_tokens, len(tokens.target))
    if plan is None:
        plan = Plan.choose(tokens_at_most, input.shape[-1], shard.largest if shard else vocab, compute, input.device)
    checks.backend(plan, input, compute)
    plan = _resolved(plan, objective, tokens)
    rows, unpack = pack(
        tokens,
        None if live is None else live.reshape(-1),
        token_weight,
        objective,
        dtype,
        live_tokens,
        plan.compact,
        plan.chunk_rows if plan.batch_invariant else 1,
    )
    plan, chunks = _with_sequences(plan, objective, rows, tokens, whole=shard is None)
    bias = None if linear_bias is None else aligned(linear_bias.detach()[:here], dtype)
    smooth = None
    if getattr(objective, "label_smoothing", 0):
        smooth_weight = input.new_ones(here, dtype=dtype) if smooth_weight is None else smooth_weight[:here]
        smooth = aligned(smooth_weight / vocab, dtype)
        shard = shard and shard.smoothing(smooth)
    softcap = None if softcap is None else float(softcap) / logit_scale
    head = Head(bias, softcap, float(temperature) / logit_scale, smooth)
    filtered = None if plan.filter is None else input.new_zeros(4, dtype=dtype)
    taken = None
    if extras is not None:
        candidates = extras.candidates
        if candidates is not None:
            candidates = rows.hidden(candidates.long().reshape(-1, candidates.shape[-1]), slice(None))
        taken = Taken.empty(extras, candidates, rows.weight)
    call = Call(here, head, rows, objective, plan, compute, weight_grad, filtered, shard, chunks, taken)
    return (
        (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias),
        call,
        lambda field: unpack(field).reshape(shape + field.shape[1:]),
    )


def _resolved(plan: Plan, objective: Any, tokens: Tokens) -> Plan:
    """The plan with `passes` and `compact` decided."""
    compact = tokens.target.device.type == "cpu" if plan.compact is None else plan.compact
    scope = _scope(objective, tokens)
    if plan.passes == 1 and scope == "batch":
        raise ValueError(f"Plan(passes=1), but a token's loss depends on other tokens in {objective}: use passes=None")
    passes = plan.passes or {"token": 1, "sequence": None, "batch": 2}[scope]
    return replace(plan, compact=compact, passes=passes)


def _with_sequences(
    plan: Plan, objective: Any, rows: Rows, tokens: Tokens, whole: bool
) -> tuple[Plan, tuple[slice, ...] | None]:
    """The plan with `passes` decided for losses that depend on a token's sequence, and chunks of whole sequences.

    One pass where every sequence fits a chunk and the host may look: so, on accelerators, with Plan(compact=True).
    """
    if plan.passes == 2 or _scope(objective, tokens) != "sequence":
        return plan, None
    may_cut = whole and plan.compact and not plan.batch_invariant
    chunks = sequence_chunks(rows, plan.chunk_rows) if may_cut else None
    if chunks is None and plan.passes == 1:
        raise ValueError(
            f"Plan(passes=1), but a token's loss depends on its sequence in {objective}, and not every sequence lies "
            f"in one piece of at most chunk_rows={plan.chunk_rows} tokens that the host may look at: use passes=None"
        )
    return replace(plan, passes=1 if chunks is not None else 2), chunks


def _scope(objective: Any, tokens: Tokens) -> str:
    """Over which tokens a token's loss extends: "token", "sequence" (those with its id) or "batch"."""
    scope = getattr(objective, "scope", None)
    return scope(tokens) if scope else "token" if token_local(objective, tokens) else "batch"
