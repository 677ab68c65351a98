"""The loss head as operators of PyTorch: what a compiled graph holds of it. See trace.py for who calls them.

    srft_kernels::one_pass      loss, statistics, gradients; the graph's backward multiplies these by the loss's factor
    srft_kernels::two_pass      statistics, and the loss made of them
    srft_kernels::second_pass   its backward
    srft_kernels::metrics       an objective's metrics
    srft_kernels::distillation  loss, divergences, gradients

They run the code of eager calls. Whatever looks at data happens inside of them: checks of ranges, the choice of tokens,
means over live ones. The fake implementation below each checks shapes and types, and knows those of its results.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from .. import engine, output
from ..call import Arguments, Call, passes
from ..distillation.engine import distillation_pass
from ..extras import TokenExtras
from ..head import accumulation_dtype
from ..objectives.objective import Objective, Tokens, TokenStats, token_losses
from ..plan import Plan
from ..rows import Normalizer
from .constants import CompiledCall, decoded, restored

# What each operator takes of a call: the tensors that are differentiated, those that are not, what may change.
SCHEMA = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor[] others, SymInt? live_tokens, str constants"
GRADIENTS = ("dx", "dW", "db")
STATISTICS = ("logprobs", "entropy", "logsumexp", "smooth")


@torch.compiler.assume_constant_result
def in_one_pass(constants: str, device: str) -> bool:
    """Whether gradients are made in the forward; so they are too where the data tell whether one pass can make them."""
    call = decoded(constants)
    if call.result != "loss" or not any(call.needs_grad):
        return False
    a = call.arguments
    plan = a.plan or Plan()
    number = passes(plan, a.objective, a.annotations)
    may_cut = (device == "cpu" if plan.compact is None else plan.compact) and not plan.batch_invariant
    return number == 1 or (number is None and may_cut)


@torch.compiler.assume_constant_result
def result_names(constants: str, in_one_pass: bool) -> tuple[str, ...]:
    """What one_pass or two_pass returns, what is differentiated first."""
    call = decoded(constants)
    a = call.arguments
    result = () if call.result == "statistics" else (call.result,)
    extras = () if a.extras is None else tuple(a.extras.sizes())
    filtered = ("filtered",) * (a.plan is not None and a.plan.filter is not None and call.result == "loss")
    gradients = tuple(name for name, needed in zip(GRADIENTS, call.needs_grad) if needed)
    last = ("scale", *gradients) if in_one_pass else ("kept",) * any(call.needs_grad)
    return *result, *statistics_of(a), *extras, *filtered, *last


def statistics_of(a: Arguments) -> tuple[str, ...]:
    return STATISTICS if a.objective is not None and a.objective.label_smoothing else STATISTICS[:3]


@torch.compiler.assume_constant_result
def metric_names(constants: str) -> tuple[str, ...]:
    """The metrics that a call has where there is a live token."""
    a, one = decoded(constants).arguments, torch.zeros(1, dtype=torch.float32, device="cpu")
    stats, tokens = TokenStats(one, one, one, one), Tokens(one.long(), **dict.fromkeys(a.annotations, one))
    argmax = tokens.target if a.extras is not None and a.extras.argmax else None
    filtered = None if a.plan is None or a.plan.filter is None else one.new_zeros(4)
    return tuple(output.metrics(a.objective or Objective(), stats, tokens, filtered, argmax))


# ---- what they share


def call_of(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, others: Sequence[Tensor],
    live_tokens: int | None, constants: str,
) -> CompiledCall:  # fmt: skip
    tensors = zip((input, linear_weight, linear_bias), decoded(constants).needs_grad)
    # marked for the plan, which looks; nothing is differentiated below autograd
    leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in tensors if tensor is not None]
    return restored(constants, [*leaves, *others], live_tokens)


def autocast(call: CompiledCall) -> contextlib.AbstractContextManager:
    """As it was around the call: a compiled graph runs without."""
    input = call.arguments.input
    if call.autocast is None:
        return engine.plain_matmul(input)
    return torch.autocast(input.device.type, getattr(torch, call.autocast))


@contextlib.contextmanager
def eagerly(call: CompiledCall) -> Iterator[None]:
    """As in an eager call. An operator runs below autograd, which objectives are differentiated with."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(autocast(call))
        stack.enter_context(torch.no_grad())
        yield


def finished(gradients: engine.Gradients, call: CompiledCall, rounded: bool = True) -> dict[str, Tensor]:
    """Those that are needed by name, dx shaped like the input."""
    dx, *rest = gradients.finish(rounded)
    values = zip(GRADIENTS, (dx if dx is None else dx.view(call.arguments.input.shape), *rest))
    return {name: value for name, value in values if value is not None}


def empty_gradients(call: CompiledCall, compute: torch.dtype | None) -> dict[str, Tensor]:
    """The same without data; those of fp16 products come in fp32, where they are scaled."""
    narrow = compute == torch.float16
    return {
        name: of.new_empty(of.shape, dtype=torch.float32 if narrow else of.dtype)
        for name, of, needed in zip(GRADIENTS, call.arguments.tensors, call.needs_grad)
        if needed
    }


def _without_extras(compiled: CompiledCall) -> CompiledCall:
    return replace(compiled, arguments=replace(compiled.arguments, extras=None))


def _results(compiled: CompiledCall, call: Call, stats: TokenStats) -> tuple[Tensor, ...]:
    """What is differentiated, from the statistics of the batch's rows."""
    if compiled.result == "statistics":
        return stats.map(call.batch.spread).fields()
    if compiled.result == "loss":
        return (engine.weighted_loss(call.objective, stats, call.batch),)
    return (call.batch.spread(token_losses(call.objective, stats, call.batch.tokens)),)


def _coefficients(
    compiled: CompiledCall, call: Call, stats: TokenStats, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients to the rows' statistics (n,), from those to what is differentiated."""
    with torch.enable_grad():
        leaves = stats.map(lambda field: field.detach().requires_grad_())
        pairs = [(out, g) for out, g in zip(_results(compiled, call, leaves), grads) if g is not None]
        pairs = [(out, g) for out, g in pairs if out.requires_grad]
        if not pairs:  # e.g. a part of the loss that is switched off
            return (torch.zeros_like(stats.logprobs),)
        outs, grads = zip(*pairs)
        return torch.autograd.grad(outs, leaves.fields(), grads, allow_unused=True)


def _per_token(call: Call, stats: TokenStats) -> dict[str, Tensor]:
    """What is told of each token, by name."""
    batch = call.batch
    results = dict(zip(STATISTICS, stats.map(batch.spread).fields()))
    if (extras := call.token_extras(stats)) is not None:
        results |= extras.map(batch.spread).present()
    return results if call.filtered is None else {**results, "filtered": call.filtered}


def _fake_per_token(compiled: CompiledCall) -> tuple[dict[str, Tensor], torch.dtype]:
    """(the same without data, the type that products run in)."""
    a = compiled.arguments
    with autocast(compiled):
        compute = a.checked().compute
    like = a.target.new_empty(a.target.shape, dtype=accumulation_dtype(compute))
    results = {name: like.clone() for name in STATISTICS}
    if a.extras is not None:
        results |= TokenExtras.empty(a.extras, like).present()
    return {**results, "filtered": like.new_empty(4)}, compute


def _most_rows(a: Arguments) -> int:
    """As many as are ever worked through, dead ones that fill up the last chunk included."""
    return a.target.numel() + (a.plan.chunk_rows - 1 if a.plan is not None and a.plan.batch_invariant else 0)


def without_tangents(run: Callable[..., Any]) -> Callable[..., Any]:
    """Forward-mode derivatives refused: where nothing needs a gradient, an operator would drop them without a word."""

    @functools.wraps(run)
    def wrapped(*arguments: Any) -> list[Tensor]:
        if forward_ad._current_level >= 0:
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
                tangents = [forward_ad.unpack_dual(x).tangent for x in arguments[:3] if x is not None]
            if any(tangent is not None for tangent in tangents):
                raise NotImplementedError("srft_kernels has no forward-mode derivative: use torch.autograd.grad")
        return run(*arguments)

    return wrapped


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], setup: Any = None, backward: Any = None):
    """`srft_kernels::` the operator of a schema."""
    name, _, _ = schema.partition("(")
    run = run if backward is None else without_tangents(run)
    operator = torch.library.custom_op(f"srft_kernels::{name}", run, mutates_args=(), schema=schema.removeprefix(name))
    operator.register_fake(fake)
    if setup is not None:
        operator.register_autograd(backward, setup_context=setup)


# ---- one_pass, whose backward is that of distillation too


def _one_pass(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    with eagerly(compiled):
        tensors, call = compiled.arguments.prepared()
        if call.plan.passes == 1:
            loss, stats, gradients, scale = engine.one_pass(tensors, compiled.needs_grad, call)
        else:
            stats, normalizer = engine.first_pass(tensors, call)
            loss = engine.weighted_loss(call.objective, stats, call.batch)
            scale = (
                engine.fp16_scale(call.batch.weight, call.objective.steep) if call.compute == torch.float16 else None
            )
            coefs = _coefficients(compiled, call, stats, [torch.ones_like(loss) if scale is None else scale])
            gradients = engine.second_pass(tensors, compiled.needs_grad, call, normalizer, coefs)
        results = {"loss": loss, **_per_token(call, stats), **finished(gradients, compiled, rounded=scale is None)}
        results["scale"] = loss.new_ones(()) if scale is None else scale
    return [results[name] for name in result_names(arguments[-1], True)]


def _fake_one_pass(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    per_token, compute = _fake_per_token(compiled)
    scalar = per_token["logprobs"].new_empty(())
    results = {"loss": scalar, **per_token, "scale": scalar.clone(), **empty_gradients(compiled, compute)}
    return [results[name] for name in result_names(arguments[-1], True)]


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.needs_grad = decoded(inputs[-1]).needs_grad
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-1 - sum(ctx.needs_grad) :])  # the scale, and the gradients
    ctx.dtypes = [tensor.dtype for tensor, needed in zip(inputs, ctx.needs_grad) if needed]
    ctx.no_gradients = no_gradients(inputs)


@engine.once_differentiable
def scale_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Those of the forward times the factor of the loss, in the graph, where it may cost nothing."""
    scale, *gradients = ctx.saved_tensors
    factor = grads[0] / scale
    scaled = iter([(g.to(factor.dtype) * factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)])
    return *(next(scaled) if needed else None for needed in ctx.needs_grad), *ctx.no_gradients


def no_gradients(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """To what follows x, W and b among an operator's arguments."""
    return tuple([None] * len(value) if isinstance(value, (list, tuple)) else None for value in inputs[3:])


define(f"one_pass({SCHEMA}) -> Tensor[]", _one_pass, _fake_one_pass, keep_gradients, scale_gradients)


# ---- two_pass


def _two_pass(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    with eagerly(compiled):
        tensors, call = compiled.arguments.prepared()
        stats, normalizer = engine.first_pass(tensors, call)
        results = {**_per_token(call, stats), compiled.result: _results(compiled, call, stats)[0]}
        if any(compiled.needs_grad):
            kept = torch.stack([*stats.fields(), *normalizer])
            results["kept"] = pad(kept, (0, _most_rows(compiled.arguments) - kept.shape[1]))
    return [results[name] for name in result_names(arguments[-1], False)]


def _fake_two_pass(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    per_token, _ = _fake_per_token(compiled)
    like, a = per_token["logprobs"], compiled.arguments
    results = {"loss": like.new_empty(()), "losses": like.clone(), **per_token}
    results["kept"] = like.new_empty((len(statistics_of(a)) + 3, _most_rows(a)))
    return [results[name] for name in result_names(arguments[-1], False)]


def _keep_call(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    compiled, names = decoded(inputs[-1]), result_names(inputs[-1], False)
    ctx.set_materialize_grads(False)
    ctx.differentiable = len(statistics_of(compiled.arguments)) if compiled.result == "statistics" else 1
    ctx.mark_non_differentiable(*output[ctx.differentiable :])
    *leaves, others, ctx.live_tokens, ctx.constants = inputs
    ctx.no_gradients = no_gradients(inputs)
    ctx.save_for_backward(output[names.index("kept")], *leaves, *others)


@engine.once_differentiable
def _through_second_pass(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    kept, input, weight, bias, *others = ctx.saved_tensors
    call = input, weight, bias, others, ctx.live_tokens, ctx.constants
    gradients = iter(torch.ops.srft_kernels.second_pass(grads[: ctx.differentiable], kept, *call))
    needs_grad = decoded(ctx.constants).needs_grad
    return *(next(gradients) if needed else None for needed in needs_grad), *ctx.no_gradients


define(f"two_pass({SCHEMA}) -> Tensor[]", _two_pass, _fake_two_pass, _keep_call, _through_second_pass)


# ---- second_pass


def _second_pass(grads: Sequence[Tensor | None], kept: Tensor, *arguments: Any) -> list[Tensor]:
    compiled = _without_extras(call_of(*arguments))
    with eagerly(compiled):
        tensors, call = compiled.arguments.prepared()
        *stats, shift, log_total, mean = kept[:, : len(call.batch)].unbind()
        coefs = _coefficients(compiled, call, TokenStats(*stats), grads)
        gradients = engine.second_pass(tensors, compiled.needs_grad, call, Normalizer(shift, log_total, mean), coefs)
        return list(finished(gradients, compiled).values())


def _fake_second_pass(grads: Sequence[Tensor | None], kept: Tensor, *arguments: Any) -> list[Tensor]:
    return list(empty_gradients(call_of(*arguments), None).values())


define(f"second_pass(Tensor?[] grads, Tensor kept, {SCHEMA}) -> Tensor[]", _second_pass, _fake_second_pass)


# ---- metrics


def _metrics(statistics: Sequence[Tensor], argmax: Tensor | None, filtered: Tensor | None, *arguments: Any) -> Tensor:
    """(M,) in the order of their names; NaN where no token is live."""
    compiled = _without_extras(call_of(*arguments))
    with eagerly(compiled):
        _, call = compiled.arguments.prepared()
        batch = call.batch
        stats = TokenStats(*map(batch.packed, statistics))
        argmax = None if argmax is None else batch.packed(argmax)
        values = output.metrics(call.objective, stats, batch.tokens, filtered, argmax, batch.weight)
        missing = statistics[0].new_full((), nan)
        return torch.stack([values.get(name, missing).to(missing.dtype) for name in metric_names(arguments[-1])])


def _fake_metrics(statistics: Sequence[Tensor], argmax: Any, filtered: Any, *arguments: Any) -> Tensor:
    return statistics[0].new_empty(len(metric_names(arguments[-1])))


def _for_logging(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


OF_METRICS = f"metrics(Tensor[] statistics, Tensor? argmax, Tensor? filtered, {SCHEMA}) -> Tensor"
define(OF_METRICS, _metrics, _fake_metrics, _for_logging)


# ---- distillation


def _distillation(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    with eagerly(compiled):
        tensors, call = compiled.arguments.prepared()
        loss, divergences, gradients, scale = distillation_pass(tensors, compiled.needs_grad, call)
        values = finished(gradients, compiled, rounded=scale is None).values()
        scale = loss.new_ones(()) if scale is None else scale
        return [loss, call.batch.spread(divergences), scale, *values]


def _fake_distillation(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    a = compiled.arguments
    with autocast(compiled):
        compute, *_ = a.checked()
    loss = a.input.new_empty((), dtype=accumulation_dtype(compute))
    divergences, scale = loss.new_empty(a.input.shape[:-1]), loss.new_empty(())
    return [loss, divergences, scale, *empty_gradients(compiled, compute).values()]


define(f"distillation({SCHEMA}) -> Tensor[]", _distillation, _fake_distillation, keep_gradients, scale_gradients)
