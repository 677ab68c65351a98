"""Backwards that have no backward of their own, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REFUSED = (
    b"srft_kernels is differentiable once: its gradients are constants to autograd, and a second derivative of the "
    b"loss head (create_graph=True) is not supported; srft_kernels.reference, on full logits, has one"
)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose gradients raise when they are differentiated themselves.

    torch's decorator of this name leaves them without a graph where the upstream gradient has none, as that of a loss:
    a penalty on gradients would then do nothing, without a word.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph=True
            return made
        return tuple(_refusing(value) if isinstance(value, Tensor) else value for value in made)

    return wrapped


def _refusing(gradient: Tensor) -> Tensor:
    return torch._C._functions.DelayedError(REFUSED, 1)(gradient.detach().requires_grad_())
