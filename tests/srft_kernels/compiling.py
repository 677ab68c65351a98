"""Compiled calls beside eager ones: what the tests of torch.compile share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled in another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable, backend="aot_eager", **options) -> Callable:
    return torch.compile(function, backend=backend, **{"fullgraph": True, **options})


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def assert_bitwise(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
