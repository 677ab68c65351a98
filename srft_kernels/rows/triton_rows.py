"""The row operations in Triton: one program per row of logits, on CUDA, ROCm, XPU or, for tests, Triton's interpreter.

    statistics         reads a row once
    loss_and_gradient  one kernel for the built-in objectives: reads the row, forms the token's loss and derivatives,
                       reads it again (from L2 where the rows in flight fit there) and writes its gradient;
                       for any other callable two kernels, with the callable between them on n-long vectors
    gradient           reads a row, writes its gradient

Logits are fp32 and die here: the gradient is written over them. A 16-bit gradient fills the front of its own row, so
the chunk needs no second buffer; its rows are then 2·stride apart, which matrix products take as they are.

A row starts on a 64-byte boundary and its stride is a multiple of 16 numbers, whatever V is (see `aligned`). Loads run
to the padded end, so that they stay 16 bytes wide, and what lies past V is replaced once the soft cap has been applied.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..extras import Taken
from ..head import Head
from ..tokens import Tokens, TokenStats
from . import Normalizer, in_three_steps, tuning
from .triton_kernels import _gradient_kernel, _loss_gradient_kernel, _scale_kernel, _scored_kernel, _statistics_kernel
from .triton_objectives import Columns, fused

SCALE, SCORED = tuning.Launch(4096, 8), tuning.Launch(1024, 4)


def statistics(
    logits: Tensor, target: Tensor, head: Head, block_rows: int, keep: bool = True, taken: Taken | None = None
) -> tuple[TokenStats, Normalizer]:
    """Statistics of the tokens whose raw logits (n, V) these are, fp32, rows padded (see Call.logits_buffer).

    The logits stay as they are, whatever `keep` says. `taken` is to be filled, if given.
    """
    n, vocab = logits.shape
    out = logits.new_empty(7, n)
    grid, options = _launch("statistics", logits)
    with _device_of(logits):
        _statistics_kernel[grid](
            logits, target, head.bias, head.smooth, out, *_extras(taken), _temperatures(head),
            n, vocab, logits.stride(0), *_numbers(head), **options,
        )  # fmt: skip
    if taken is not None:
        taken.take_entries(logits, head.bias)
        taken.settle(partial(_scored, head), out[4], out[5])
    smooth = None if head.smooth is None else out[3]
    return TokenStats(out[0], out[1], out[2], smooth), Normalizer(out[4], out[5], out[6])


def loss_and_gradient(
    logits: Tensor,
    tokens: Tokens,
    weight: Tensor,
    objective: Any,
    head: Head,
    block_rows: int,
    dtype: torch.dtype,
    taken: Taken | None = None,
) -> tuple[TokenStats, Tensor, Tensor]:
    """One pass: statistics, loss per token (n,), and ∂(Σ weight·loss)/∂(raw logits) (n, V) as `dtype`.

    `taken` is to be filled, if given.
    """
    if (device_code := fused(objective, tokens)) is None:
        asked = logits, tokens, weight, objective, head, block_rows, dtype
        return in_three_steps(statistics, gradient, *asked, taken=taken)
    structure, numbers = device_code
    n, vocab = logits.shape
    out, dlogits = logits.new_empty(4, n), _over(logits, dtype)
    normalizer = None
    if taken is not None:
        taken.take_entries(logits, head.bias)  # before the gradient is written over them
        normalizer = logits.new_empty(2, n)
    grid, options = _launch("loss_gradient", logits)
    with _device_of(logits):
        _loss_gradient_kernel[grid](
            logits, dlogits, tokens.target, weight, _columns(tokens), numbers,
            head.bias, head.smooth, _total(head), out, normalizer, *_extras(taken), _temperatures(head),
            n, vocab, logits.stride(0), dlogits.stride(0),
            *_numbers(head), structure, _order(logits, dlogits), **options,
        )  # fmt: skip
    if taken is not None:
        taken.settle(partial(_scored, head), *normalizer)
    return TokenStats(out[1], out[2], out[3]), out[0], dlogits


def gradient(
    logits: Tensor,
    target: Tensor,
    normalizer: Normalizer,
    coefs: tuple[Tensor | None, ...],
    head: Head,
    block_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Second pass: the gradient (n, V) from recomputed logits and ∂L/∂(each statistic) (n,), over the logits."""
    n, vocab = logits.shape
    dlogits = _over(logits, dtype)
    g, h, k, u = (None if coef is None else coef.contiguous() for coef in (*coefs, None)[:4])
    grid, options = _launch("gradient", logits)
    with _device_of(logits):
        _gradient_kernel[grid](
            logits, dlogits, target, *normalizer, g, h, k, u, head.bias, head.smooth, _total(head), _temperatures(head),
            n, vocab, logits.stride(0), dlogits.stride(0), *_numbers(head),
            _order(logits, dlogits), **options,
        )  # fmt: skip
    return dlogits


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor (0-d, on x's device) without a host synchronisation, and for nothing when it is 1."""
    grid = (triton.cdiv(x.numel(), SCALE.block),)
    with _device_of(x):
        _scale_kernel[grid](x, factor.float(), x.numel(), BLOCK=SCALE.block, num_warps=SCALE.warps)
    return x


def _scored(head: Head, a: Tensor) -> Tensor:
    """z of entries a + b (n, k), by the kernels' own tanh and division: torch's round otherwise, here and there."""
    z = a.clone()
    with _device_of(a):
        _scored_kernel[(triton.cdiv(a.numel(), SCORED.block),)](
            z, _temperatures(head), a.numel(), a.shape[1], *_numbers(head),
            BLOCK=SCORED.block, num_warps=SCORED.warps,
        )  # fmt: skip
    return z


def _extras(taken: Taken | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if taken is None else (taken.results.rank, taken.results.argmax)


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of the logits (n, V) as a gradient of `dtype`: narrow rows fill the front of their own wide rows."""
    if dtype == logits.dtype:
        return logits
    n, vocab = logits.shape
    rows = logits.as_strided((n, logits.stride(0)), (logits.stride(0), 1))
    return rows.view(dtype)[:, :vocab]


def _order(logits: Tensor, dlogits: Tensor) -> str:
    """How a row's reads are kept before its writes where they overlap: a barrier waits for loads on NVIDIA alone."""
    if dlogits.dtype == logits.dtype:  # each thread overwrites what it has read itself
        return "none"
    return "reduction" if torch.version.hip or logits.device.type == "xpu" else "barrier"


def _columns(tokens: Tokens) -> Columns:
    """The annotations that device code reads, fp32 (is_demo: bytes), contiguous; None where not given."""
    columns = (tokens.get(name) for name in Columns._fields)
    return Columns(
        *(
            c if c is None else c.contiguous().view(torch.uint8) if c.dtype == torch.bool else c.float().contiguous()
            for c in columns
        )
    )


def _launch(kernel: str, logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, launch options) of a row kernel on these logits (n, V)."""
    n, vocab = logits.shape
    settings = tuning.launch(kernel, vocab, tuning.target(logits.device))
    return settings.grid(n, logits.device), options(kernel, settings, 64 if torch.version.hip else 32)


def options(kernel: str, settings: tuning.Launch, warp_size: int) -> dict[str, int]:
    lanes = max(1, min(settings.warps * warp_size, settings.block // 4))
    return {"BLOCK": settings.block, "LANES": lanes, "WALK": settings.programs is not None, "num_warps": settings.warps}


def _numbers(head: Head) -> tuple[float | None, float | None, float | None]:
    """(scale, soft cap, temperature) of all rows; None for what changes nothing, or where each row has its own."""
    temperature = None if isinstance(head.temperature, Tensor) or head.temperature == 1 else float(head.temperature)
    return None if head.scale == 1 else head.scale, head.softcap, temperature


def _temperatures(head: Head) -> Tensor | None:
    """(n,) where each row has its own."""
    return head.temperature.contiguous() if isinstance(head.temperature, Tensor) else None


def _total(head: Head) -> Tensor | None:
    return None if head.smooth is None else head.smooth.sum()


def _device_of(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
