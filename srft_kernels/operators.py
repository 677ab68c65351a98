"""The loss head as operators of PyTorch: what a compiled graph holds of it. See `compiled` for who calls them.

    srft_kernels::one_pass      loss, statistics, gradients; the graph's backward multiplies these by the loss's factor
    srft_kernels::two_pass      statistics, and the loss made of them
    srft_kernels::second_pass   its backward
    srft_kernels::metrics       an objective's metrics
    srft_kernels::distillation  loss, divergences, gradients

They run the code of eager calls. Whatever looks at data happens inside of them: checks of ranges, packing, means over
live tokens. Their fake implementations check shapes and types, and know those of the results.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from . import output
from .derivatives import once_differentiable
from .distillation import DistillationArguments, distil
from .engine import Call, Gradients, first_pass, fp16_scale, one_pass, plain_matmul, second_pass, weighted_loss
from .gemm import accumulation_dtype
from .options import (
    GRADIENTS,
    STATISTICS,
    TEACHING,
    Around,
    DistillationOptions,
    Options,
    decoded,
    metric_names,
    result_names,
)
from .pack import Rows
from .prepare import Arguments
from .rows import Normalizer
from .tokens import TokenStats, per_token_loss

# What each of the operators takes of a call.
ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? temperature, "
    "Tensor? token_weight, Tensor? class_weight, Tensor? candidates, Tensor[] annotations, SymInt? live_tokens, "
    "str options"
)
# What that of `linear_distillation` takes: the student's three tensors, which are differentiated, and TEACHING.
OF_DISTILLATION = (
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor teacher_input, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor? mask, Tensor? token_weight, str options) -> Tensor[]"
)


def _arguments(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    temperature: Tensor | None,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    candidates: Tensor | None,
    annotations: Sequence[Tensor],
    live_tokens: int | None,
    options: str,
) -> tuple[Arguments, Options]:
    o = decoded(options)
    arguments = Arguments(
        input.detach(),
        linear_weight.detach(),
        target,
        o.objective,
        linear_bias=None if linear_bias is None else linear_bias.detach(),
        temperature=o.temperature if temperature is None else temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
        ignore_index=o.ignore_index,
        vocab_size=o.vocab_size,
        live_tokens=live_tokens,
        token_weight=token_weight,
        annotations=dict(zip(o.annotations, annotations)),
        class_weight=class_weight,
        reduction=o.reduction,
        plan=o.plan,
        extras=o.extras if candidates is None else replace(o.extras, candidates=candidates),
    )
    return arguments, o


def _distillation_arguments(*arguments: Any) -> tuple[DistillationArguments, DistillationOptions]:
    input, linear_weight, linear_bias, *constants, options = arguments
    o, constants = decoded(options), dict(zip(TEACHING, constants))
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias, **constants}
    return replace(o.arguments, **tensors), o


def _autocast(a: Arguments | DistillationArguments, o: Around) -> contextlib.AbstractContextManager:
    """As it was around the call: a compiled graph runs without."""
    if o.autocast is None:
        return plain_matmul(a.input)
    return torch.autocast(a.input.device.type, getattr(torch, o.autocast))


@contextlib.contextmanager
def _eagerly(a: Arguments | DistillationArguments, o: Around) -> Iterator[None]:
    """As in an eager call. An operator runs below autograd, which objectives are differentiated with."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(_autocast(a, o))
        stack.enter_context(torch.no_grad())
        yield


def _one_pass(*arguments: Any) -> list[Tensor]:
    a, o = _arguments(*arguments)
    with _eagerly(a, o):
        tensors, call, spread = a.prepared()
        if call.plan.passes == 1:
            loss, stats, gradients, scale = one_pass(tensors, o.wanted, call)
        else:
            stats, normalizer = first_pass(tensors, call)
            (loss,) = _made(o, call, spread, stats)
            scale = fp16_scale(call.rows.weight) if call.compute == torch.float16 else None
            coefs = _coefficients(o, call, spread, stats, [torch.ones_like(loss) if scale is None else scale])
            gradients = second_pass(tensors, o.wanted, call, normalizer, coefs)
        found = {"loss": loss, **_statistics(call, spread, stats)}
        found |= dict(zip(GRADIENTS, _finished(gradients, a, rounded=scale is None)))
        found["scale"] = loss.new_ones(()) if scale is None else scale
    return [found[name] for name in result_names(arguments[-1], True)]


def _two_pass(*arguments: Any) -> list[Tensor]:
    a, o = _arguments(*arguments)
    with _eagerly(a, o):
        tensors, call, spread = a.prepared()
        stats, normalizer = first_pass(tensors, call)
        found = {**_statistics(call, spread, stats), o.made: _made(o, call, spread, stats)[0]}
        if any(o.wanted):
            kept = torch.stack([*stats.fields(), *normalizer])
            found["kept"] = pad(kept, (0, _most_rows(a) - kept.shape[1]))
    return [found[name] for name in result_names(arguments[-1], False)]


def _second_pass(grads: Sequence[Tensor | None], kept: Tensor, *arguments: Any) -> list[Tensor]:
    a, o = _arguments(*arguments)
    a = replace(a, extras=None)
    with _eagerly(a, o):
        tensors, call, spread = a.prepared()
        *stats, shift, log_total, mean = kept[:, : len(call.rows)].unbind()
        coefs = _coefficients(o, call, spread, TokenStats(*stats), grads)
        gradients = second_pass(tensors, o.wanted, call, Normalizer(shift, log_total, mean), coefs)
        found = _finished(gradients, a)
    return [gradient for gradient in found if gradient is not None]


def _metrics(statistics: Sequence[Tensor], argmax: Tensor | None, filtered: Tensor | None, *arguments: Any) -> Tensor:
    """(M,) in the order of their names; NaN where no token is live."""
    a, o = _arguments(*arguments)
    with _eagerly(a, o):
        _, call, _ = replace(a, extras=None).prepared()
        stats = TokenStats(*(_packed(call.rows, field) for field in statistics))
        argmax = None if argmax is None else _packed(call.rows, argmax)
        found = output.metrics(o.objective, stats, call.rows.tokens, filtered, argmax, call.rows.weight)
        missing = statistics[0].new_full((), nan)
        return torch.stack([found.get(name, missing).to(missing.dtype) for name in metric_names(arguments[-1])])


def _distillation(*arguments: Any) -> list[Tensor]:
    a, o = _distillation_arguments(*arguments)
    with _eagerly(a, o):
        tensors, call, spread = a.prepared()
        loss, divergence, gradients, scale = distil(tensors, o.wanted, call)
        found = _finished(gradients, a, rounded=scale is None)
        scale = loss.new_ones(()) if scale is None else scale
        return [loss, spread(divergence), scale, *(gradient for gradient in found if gradient is not None)]


def _finished(
    gradients: Gradients, a: Arguments | DistillationArguments, rounded: bool = True
) -> tuple[Tensor | None, ...]:
    """(dx, dW, db), dx shaped like the input."""
    dx, *rest = gradients.finish(rounded)
    return dx if dx is None else dx.view(a.input.shape), *rest


def _made(o: Options, call: Call, spread: Any, stats: TokenStats) -> tuple[Tensor, ...]:
    """What is differentiated, from the packed rows' statistics."""
    if o.made == "statistics":
        return stats.map(spread).fields()
    if o.made == "loss":
        return (weighted_loss(call.objective, stats, call.rows),)
    return (spread(per_token_loss(call.objective, stats, call.rows.tokens)),)


def _coefficients(
    o: Options, call: Call, spread: Any, stats: TokenStats, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients to the packed rows' statistics, from those to what is made of them."""
    with torch.enable_grad():
        leaves = stats.map(lambda field: field.detach().requires_grad_())
        made = [(out, grad) for out, grad in zip(_made(o, call, spread, leaves), grads) if grad is not None]
        made = [(out, grad) for out, grad in made if out.requires_grad]
        if not made:  # e.g. a part of the loss that is switched off
            return (torch.zeros_like(stats.logprobs),)
        outs, grads = zip(*made)
        return torch.autograd.grad(outs, leaves.fields(), grads, allow_unused=True)


def _statistics(call: Call, spread: Any, stats: TokenStats) -> dict[str, Tensor]:
    """What is told of each token, by name."""
    found = dict(zip(STATISTICS, stats.map(spread).fields()))
    if call.taken is not None:
        found |= {name: x for name, x in vars(call.taken.settled(stats).map(spread)).items() if x is not None}
    return found | ({} if call.filtered is None else {"filtered": call.filtered})


def _packed(rows: Rows, field: Tensor) -> Tensor:
    """A field (...) shaped like target as the rows have it (n,), padding included."""
    field = field.reshape(-1)
    field = field if rows.index is None else field[rows.index]
    return pad(field, (0, len(rows) - len(field)))


def _most_rows(a: Arguments) -> int:
    """As many as are ever worked through, dead ones that fill up the last chunk included."""
    return a.target.numel() + (a.plan.chunk_rows - 1 if a.plan is not None and a.plan.batch_invariant else 0)


# ---- shapes


def _fake(in_one_pass: bool):
    def fake(*arguments: Any) -> list[Tensor]:
        a, o = _arguments(*arguments)
        with _autocast(a, o):
            compute, *_ = a.checked()
        return [_empty(name, a, o, compute) for name in result_names(arguments[-1], in_one_pass)]

    return fake


def _fake_second_pass(grads: Sequence[Tensor | None], kept: Tensor, *arguments: Any) -> list[Tensor]:
    a, o = _arguments(*arguments)
    return [_empty_gradient(name, a, None) for name in o.gradients]


def _fake_metrics(statistics: Sequence[Tensor], argmax: Any, filtered: Any, *arguments: Any) -> Tensor:
    return statistics[0].new_empty(len(metric_names(arguments[-1])))


def _fake_distillation(*arguments: Any) -> list[Tensor]:
    a, o = _distillation_arguments(*arguments)
    with _autocast(a, o):
        compute, *_ = a.checked()
    loss = a.input.new_empty((), dtype=accumulation_dtype(compute))
    divergence = loss.new_empty(a.input.shape[:-1])
    return [loss, divergence, loss.new_empty(()), *[_empty_gradient(name, a, compute) for name in o.gradients]]


def _empty_gradient(name: str, a: Arguments | DistillationArguments, compute: torch.dtype | None) -> Tensor:
    of = a.tensors[GRADIENTS.index(name)]
    return of.new_empty(of.shape, dtype=torch.float32 if compute == torch.float16 else of.dtype)


def _empty(name: str, a: Arguments, o: Options, compute: torch.dtype) -> Tensor:
    """A result of one_pass or two_pass, by its name."""
    if name in GRADIENTS:
        return _empty_gradient(name, a, compute)
    shape, dtype = a.target.shape, accumulation_dtype(compute)
    if name in ("loss", "scale"):
        shape = ()
    elif name == "filtered":
        shape = (4,)
    elif name == "kept":
        shape = (len(o.statistics) + 3, _most_rows(a))
    elif name.startswith("top"):
        shape = (*shape, o.extras.top_k)
    elif name.startswith("candidate"):
        shape = a.extras.candidates.shape
    integer = name in ("rank", "argmax", "top_ids")
    return a.target.new_empty(shape, dtype=torch.int64 if integer else dtype)


# ---- gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.wanted = decoded(inputs[-1]).wanted
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-1 - sum(ctx.wanted) :])  # the scale, and the gradients that are wanted
    ctx.dtypes = [tensor.dtype for tensor, wanted in zip(inputs, ctx.wanted) if wanted]
    ctx.nothing = _no_gradients(inputs)


@once_differentiable
def _scale_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Those of the forward times the factor of the loss, in the graph, where it may cost nothing."""
    scale, *made = ctx.saved_tensors
    factor = grads[0] / scale
    scaled = iter([(g.to(factor.dtype) * factor).to(dtype) for g, dtype in zip(made, ctx.dtypes)])
    return *(next(scaled) if wanted else None for wanted in ctx.wanted), *ctx.nothing


def _keep_call(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    o, names = decoded(inputs[-1]), result_names(inputs[-1], False)
    ctx.set_materialize_grads(False)
    ctx.differentiable = len(o.statistics) if o.made == "statistics" else 1
    ctx.mark_non_differentiable(*output[ctx.differentiable :])
    *tensors, annotations, ctx.live_tokens, ctx.options = inputs
    ctx.nothing = _no_gradients(inputs)
    ctx.save_for_backward(output[names.index("kept")], *tensors, *annotations)


@once_differentiable
def _through_second_pass(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    o = decoded(ctx.options)
    kept, *saved = ctx.saved_tensors
    tensors, annotations = saved[:8], saved[8:]
    call = *tensors, annotations, ctx.live_tokens, ctx.options
    made = iter(torch.ops.srft_kernels.second_pass(grads[: ctx.differentiable], kept, *call))
    return *(next(made) if wanted else None for wanted in o.wanted), *ctx.nothing


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Metrics are for logging: nothing is differentiated through them."""
    ctx.mark_non_differentiable(output)


def _no_gradients(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """To what follows x, W and b among an operator's arguments."""
    return tuple([None] * len(value) if isinstance(value, (list, tuple)) else None for value in inputs[3:])


def _without_tangents(run: Any) -> Any:
    """Forward-mode derivatives refused: where nothing wants a gradient, an operator would drop them without a word."""

    @functools.wraps(run)
    def wrapped(*arguments: Any) -> list[Tensor]:
        if forward_ad._current_level >= 0:
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
                tangents = [forward_ad.unpack_dual(x).tangent for x in arguments[:3] if x is not None]
            if any(tangent is not None for tangent in tangents):
                raise NotImplementedError("srft_kernels has no forward-mode derivative: use torch.autograd.grad")
        return run(*arguments)

    return wrapped


def _define(name: str, schema: str, run: Any, fake: Any, setup: Any = None, backward: Any = None) -> None:
    run = run if backward is None else _without_tangents(run)
    operator = torch.library.custom_op(f"srft_kernels::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if setup is not None:
        operator.register_autograd(backward, setup_context=setup)


OF_BACKWARD = f"(Tensor?[] grads, Tensor kept, {ARGUMENTS}) -> Tensor[]"
OF_METRICS = f"(Tensor[] statistics, Tensor? argmax, Tensor? filtered, {ARGUMENTS}) -> Tensor"
_define("one_pass", f"({ARGUMENTS}) -> Tensor[]", _one_pass, _fake(True), _keep_gradients, _scale_gradients)
_define("two_pass", f"({ARGUMENTS}) -> Tensor[]", _two_pass, _fake(False), _keep_call, _through_second_pass)
_define("second_pass", OF_BACKWARD, _second_pass, _fake_second_pass)  # differentiated once
_define("metrics", OF_METRICS, _metrics, _fake_metrics, _constant)
_define("distillation", OF_DISTILLATION, _distillation, _fake_distillation, _keep_gradients, _scale_gradients)
