"""Small kernels in Triton on what is not a row of logits: gradients to scale, tokens to prepare, entries to score.

Device code alone: what launches it is in triton_rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _scored


@triton.jit(do_not_specialize=["count", "k"])
def _scored_kernel(
    a_ptr,  # (n, k) fp32, a + b of some entries of n rows
    temperature_ptr,  # (n,) fp32, or None
    count, k, head, BLOCK: tl.constexpr,
):  # fmt: skip
    """z in the place of a + b."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    a = tl.load(a_ptr + places, mask=inside)
    temperature = head.temperature
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + places // k, mask=inside, other=1.0)
    z, _ = _scored(a, places, count, head, temperature, False)
    tl.store(a_ptr + places, z, mask=inside)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor, reading and writing nothing when the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        size = tl.full((), BLOCK, tl.int64)  # times the number of a block it may pass 2³¹
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            offsets = block * size + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < count)
            tl.store(x_ptr + offsets, (x.to(tl.float32) * factor).to(x.dtype), mask=offsets < count)


@triton.jit(do_not_specialize=["count"])
def _prepare_kernel(
    live_ptr, target_ptr, weight_ptr,  # (n,) boolean, int64, fp32 or None: 1 / (number of live tokens)
    safe_ptr,  # (n,) int64: the target, 0 where dead
    out_ptr,  # (n + 1,) fp32: the token weight, 0 where dead, and a 0
    count, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a small call waits for launches, and a large one not for 8 bytes of a token."""
    places = tl.arange(0, BLOCK)
    mean = 0.0
    if weight_ptr is None:
        total = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, count, BLOCK):
            total += tl.load(live_ptr + start + places, mask=start + places < count, other=0).to(tl.int32)
        mean = tl.div_rn(1.0, tl.maximum(tl.sum(total, 0), 1).to(tl.float32))
    for start in range(0, count, BLOCK):
        inside = start + places < count
        live = tl.load(live_ptr + start + places, mask=inside, other=0) != 0
        target = tl.load(target_ptr + start + places, mask=inside, other=0)
        weight = mean if weight_ptr is None else tl.load(weight_ptr + start + places, mask=inside, other=0.0)
        tl.store(safe_ptr + start + places, tl.where(live, target, 0), mask=inside)
        tl.store(out_ptr + start + places, tl.where(live, weight, 0.0), mask=inside)
    tl.store(out_ptr + count, 0.0)
