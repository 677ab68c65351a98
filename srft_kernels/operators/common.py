"""What the operators share: a call from what they take, run as an eager call runs, and refused forward derivatives."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..engine import Gradients, once_differentiable, plain_matmul
from .constants import CompiledCall, decoded, restored

# What each operator takes of a call: the tensors that are differentiated, those that are not, what may change.
SCHEMA = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor[] others, SymInt? live_tokens, str constants"
GRADIENTS = ("dx", "dW", "db")


def call_of(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    others: Sequence[Tensor],
    live_tokens: int | None,
    constants: str,
) -> CompiledCall:
    leaves = [tensor.detach() for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    return restored(constants, [*leaves, *others], live_tokens)


def autocast(call: CompiledCall) -> contextlib.AbstractContextManager:
    """As it was around the call: a compiled graph runs without."""
    input = call.arguments.input
    if call.autocast is None:
        return plain_matmul(input)
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


def finished(gradients: Gradients, call: CompiledCall, rounded: bool = True) -> dict[str, Tensor]:
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


# ---- the backward of an operator that returns (result, …, scale, *gradients)


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.needs_grad = decoded(inputs[-1]).needs_grad
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-1 - sum(ctx.needs_grad) :])  # the scale, and the gradients
    ctx.dtypes = [tensor.dtype for tensor, needed in zip(inputs, ctx.needs_grad) if needed]
    ctx.no_gradients = no_gradients(inputs)


@once_differentiable
def scale_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Those of the forward times the factor of the loss, in the graph, where it may cost nothing."""
    scale, *gradients = ctx.saved_tensors
    factor = grads[0] / scale
    scaled = iter([(g.to(factor.dtype) * factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)])
    return *(next(scaled) if needed else None for needed in ctx.needs_grad), *ctx.no_gradients


def no_gradients(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """To what follows x, W and b among an operator's arguments."""
    return tuple([None] * len(value) if isinstance(value, (list, tuple)) else None for value in inputs[3:])


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
