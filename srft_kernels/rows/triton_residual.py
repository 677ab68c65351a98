"""C += A · B if a number on the device says so: what a filtered chunk dropped, where that was too much.

The host never learns whether it ran. Rarely needed, so it is a plain product, not a tuned one: where the bound is kept
every program loads one byte and leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_rows import device_of

BLOCK_M, BLOCK_N = 128, 128
BLOCK_K = {2: 64, 4: 16}  # by the bytes of a number: three steps of both operands fit 96 KB of shared memory
GROUP = 8  # tile rows that share B's tiles in L2


@triton.jit
def _add_product_kernel(
    a_ptr, b_ptr, c_ptr,  # (m, k), (k, n) in one type; (m, n)
    when_ptr,  # () boolean
    m, n, k,
    a_row, a_column, b_row, b_column, c_row, c_column,  # strides
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if tl.load(when_ptr) != 0:
        tiles_m = tl.cdiv(m, BLOCK_M)
        tiles_n = tl.cdiv(n, BLOCK_N)
        group, within = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        rows = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_in, columns_in = (rows < m)[:, None], (columns < n)[None, :]
        rows, columns = rows[:, None].to(tl.int64), columns[None, :].to(tl.int64)  # times a stride they pass 2³¹
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            of_row, of_column = inner[None, :].to(tl.int64), inner[:, None].to(tl.int64)
            a = tl.load(a_ptr + rows * a_row + of_row * a_column, mask=rows_in & (of_row < k), other=0.0)
            b = tl.load(b_ptr + of_column * b_row + columns * b_column, mask=(of_column < k) & columns_in, other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        places = c_ptr + rows * c_row + columns * c_column
        inside = rows_in & columns_in
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        tl.store(places, total.to(c_ptr.dtype.element_ty), mask=inside)


def add_product_(c: Tensor, a: Tensor, b: Tensor, when: Tensor) -> Tensor:  # (m, n), (m, k), (k, n), ()
    """c += a · b where `when` holds; fp32 sums, c rounded once."""
    (m, k), n = a.shape, b.shape[1]
    grid = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)
    with device_of(c):
        _add_product_kernel[grid](
            a_ptr=a, b_ptr=b, c_ptr=c, when_ptr=when.view(torch.uint8), m=m, n=n, k=k,
            a_row=a.stride(0), a_column=a.stride(1), b_row=b.stride(0), b_column=b.stride(1),
            c_row=c.stride(0), c_column=c.stride(1), **launch(a.dtype),
        )  # fmt: skip
    return c


def launch(dtype: torch.dtype) -> dict[str, int]:
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[dtype.itemsize], "GROUP": GROUP}
    return {**tile, "num_warps": 8, "num_stages": 3}
