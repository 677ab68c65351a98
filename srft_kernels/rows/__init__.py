"""Row backends: the same three functions (`statistics`, `loss_and_gradient`, `gradient`) in PyTorch and in Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import Head
from ..tokens import Tokens, TokenStats, coefficients

BACKENDS = ("torch", "triton")
TRITON_DEVICES = ("cuda", "xpu")  # that Triton compiles for; torch calls ROCm's cuda too

# Rows of a logits buffer start at multiples of this many numbers, so that loads are 16 bytes wide for any vocabulary.
ROW_ALIGNMENT = 16


def aligned_size(vocab: int) -> int:
    """Numbers that a row of `vocab` takes up in memory."""
    return -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def aligned(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a vector (V,) that can be read, as zeros, up to its aligned size."""
    room = vector.new_zeros(aligned_size(len(vector)), dtype=dtype)[: len(vector)]
    return room.copy_(vector)


class Normalizer(NamedTuple):
    """p_v = e^{d_v − log_total} with d = z − shift: a row's maximum, log Σ e^d, and Σ p·d, each (n,).

    Kept apart because their sums, the logsumexp and the entropy log_total − mean, have rounded away what the gradient
    needs: p where logits are huge, and log p + H = d − mean.
    """

    shift: Tensor
    log_total: Tensor
    mean: Tensor


def in_three_steps(
    statistics: Callable,
    gradient: Callable,
    logits: Tensor,
    tokens: Tokens,
    weight: Tensor,
    objective: Any,
    head: Head,
    block_rows: int,
    dtype: torch.dtype,
    **asked: Any,
) -> tuple[TokenStats, Tensor, Tensor]:
    """loss_and_gradient made of the other two, with the objective between them, which is shown all rows at once."""
    stats, normalizer = statistics(logits, tokens.target, head, block_rows, keep=True, **asked)
    loss, coefs = coefficients(objective, stats, tokens, weight)
    return stats, loss, gradient(logits, tokens.target, normalizer, coefs, head, block_rows, dtype)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there without being asked for: where Triton is installed, but not in fp64."""
    return device.type in TRITON_DEVICES and dtype != torch.float64 and has_triton()


def backend(name: str) -> ModuleType:
    """The module of a row backend, imported when first asked for: Triton is optional."""
    if name == "torch":
        from . import torch_rows

        return torch_rows
    if name == "triton":
        try:
            from . import triton_rows
        except ImportError as error:
            raise ImportError("the triton row backend needs triton ≥ 3.6: pip install triton") from error
        return triton_rows
    raise ValueError(f"unknown row backend {name!r}: expected one of {', '.join(BACKENDS)}")
