"""How a call will run: a small value computed from shapes, types and a memory budget, to be printed or made by hand.

>>> print(Plan.choose(8192, 4096, 151936, torch.bfloat16, "cuda"))
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch

from . import checks
from .head import accumulation_dtype, aligned_size, mixes
from .rows import RowOps

TRITON_DEVICES = ("cuda", "xpu")  # that Triton compiles for; torch calls ROCm's cuda too
SAMPLE = 16  # tokens of a chunk, at even distances, that a filter's error in dx is measured on
MIB = 2**20
# Enough rows for the products to run at full rate, in memory that nobody misses. Measured for CPU; on accelerators the
# weight-gradient product reads and writes its V·H sum every time, so more rows wait for it there.
CPU_WORKSPACE, WORKSPACE = 80_000_000, 1024 * MIB
MIN_CHUNK_ROWS = 64
# Where ∂L/∂a has a buffer of its own: rows of logits at most, where both share one budget, and at least, unless memory
# is short (fewer would read the head faster than memory can); rows whose gradients there is always memory for.
MOST_LOGITS, SHARED_LOGITS, LEAST_LOGITS, WAITING = 1024, 512, 256, 8192
MULTIPROCESSORS, TILE = 132, (128, 256)  # Hopper's, and the part of a product that one of them makes
FILLED_ROWS = 2048  # at most, where every chunk is filled up to its size
BLOCK_BYTES = 6 * MIB  # of logits per block of the torch row backend: more fall out of the caches of two cores


@checks.options
@dataclass(frozen=True)
class Filter:
    """Which part of ∂L/∂a the backward products leave out.

    columns             the part of the vocabulary that is kept, in (0, 1]
    max_relative_error  bound, for each group of tokens, on ‖dropped‖ / ‖∂L/∂a‖ (all norms Frobenius), which is about
                        dW's relative error, and on dx's relative error over SAMPLE of its tokens. A product that would
                        pass it is done densely.
    """

    columns: float = 1 / 16
    max_relative_error: float = 1e-2

    def __post_init__(self):
        for name, most in (("columns", 1), ("max_relative_error", float("inf"))):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 < value <= most):
                raise ValueError(f"Filter({name}={value!r}): expected a number in (0, {most}]")


@checks.options
@dataclass(frozen=True)
class Plan:
    """How the loss head runs.

    backend          row operations: "torch" or "triton"
    chunk_rows       tokens whose logits exist at one time
    block_rows       rows per block inside a chunk (torch rows only)
    passes           1: gradients in the forward while the logits live (6NHV flops); 2: logits recomputed in the
                     backward (8NHV), for losses that are differentiated freely; None: 1 where the objective allows
    compact          leave every ignored token out, which takes their number on the host: on a GPU one synchronisation
                     per call. None: only on CPUs (see `live_tokens` of linear_loss)
    batch_invariant  a token's ℓ, H and dx are bitwise the same whatever else is in the batch: every product has
                     chunk_rows rows, the last chunk is filled up with zeros
    filter           a Filter: the backward products leave out columns of ∂L/∂a that hardly matter (filter.py)
    workspace_bytes  what `choose` counted beside inputs and returned gradients (0 in a plan made by hand)
    gradient_rows    tokens whose ∂L/∂a exists at one time: dx and dW are multiplied once for so many. Of 16-bit inputs
                     on CUDA it has a buffer of its own, in 16 bits; elsewhere logits become it. None: chunk_rows
    """

    backend: str = "torch"
    chunk_rows: int = 256
    block_rows: int = 8
    passes: int | None = None
    compact: bool | None = None
    batch_invariant: bool = False
    filter: Filter | None = None
    workspace_bytes: int = 0
    gradient_rows: int | None = None

    def __post_init__(self):
        if self.backend not in ("torch", "triton"):
            raise ValueError(f"Plan(backend={self.backend!r}): expected 'torch' or 'triton'")
        if self.passes not in (None, 1, 2):
            raise ValueError(f"Plan(passes={self.passes}): expected 1, 2 or None")
        if not (self.filter is None or isinstance(self.filter, Filter)):
            raise TypeError(f"Plan(filter={self.filter!r}): expected a Filter or None")
        if self.filter and self.batch_invariant:
            raise ValueError(
                "Plan(filter=..., batch_invariant=True): which columns are kept depends on the whole chunk"
            )
        for name in ("chunk_rows", "block_rows", "gradient_rows"):
            value = getattr(self, name)
            if value is None and name == "gradient_rows":
                continue
            if not (checks.integer(value) and value > 0):
                raise ValueError(f"Plan({name}={value!r}): expected a positive integer")
            object.__setattr__(self, name, int(value))  # of NumPy's
        if self.batch_invariant and self.gradient_rows not in (None, self.chunk_rows):
            raise ValueError(
                f"Plan(batch_invariant=True, chunk_rows={self.chunk_rows}, gradient_rows={self.gradient_rows}): every "
                "product has chunk_rows rows, so leave gradient_rows out"
            )
        if self.gradient_rows is not None and self.gradient_rows < self.chunk_rows:
            raise ValueError(
                f"Plan(chunk_rows={self.chunk_rows}, gradient_rows={self.gradient_rows}): gradients of whole chunks "
                "are multiplied at once, so take gradient_rows >= chunk_rows"
            )

    @classmethod
    @checks.told
    def choose(
        cls,
        tokens: int,
        hidden: int,
        vocab: int,
        dtype: torch.dtype,
        device: torch.device | str,
        workspace_bytes: int | None = None,
        *,
        passes: int | None = None,
        compact: bool | None = None,
        batch_invariant: bool = False,
        filter: Filter | None = None,
        head_gradient: bool = True,
    ) -> Plan:
        """The plan for `tokens` rows of size `hidden` against a head of `vocab` entries.

        `workspace_bytes` bounds the logits and their gradients that exist at one time (and scratch); by default 80 MB
        on CPU and 1 GiB elsewhere, but no fewer than 64 rows. What a 16-bit head takes in fp32 comes on top, and is
        counted in the plan's `workspace_bytes`: the sum of its gradient, and outside of CUDA the head itself, widened.
        On CUDA that sum is not needed where one product makes dW: bf16 gradients of all tokens may then take its
        memory and, by default, no less than those of 8192 tokens. With `head_gradient` False nothing comes on top.

        Triton rows where Triton drives the device (CUDA, ROCm, XPU) and is installed, but for fp64; PyTorch rows on all
        others. A TypeError for fp64 on MPS, which has none.
        """
        device = torch.device(device)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, found {dtype!r}")
        if device.type == "mps" and dtype == torch.float64:
            raise TypeError("MPS has no fp64: take fp32, or a plan for the CPU")
        itemsize = accumulation_dtype(dtype).itemsize
        row_bytes = aligned_size(max(vocab, 1)) * itemsize
        block_rows = max(1, min(BLOCK_BYTES // row_bytes, 64))
        triton = runs_triton(device, dtype)
        if workspace_bytes is None:
            budget, least = CPU_WORKSPACE if device.type == "cpu" else WORKSPACE, MIN_CHUNK_ROWS
        else:
            budget, least = workspace_bytes, 1
            block_rows = max(1, min(block_rows, budget // (4 * row_bytes)))
        scratch = 0 if triton else block_rows * row_bytes
        head_bytes = vocab * hidden * itemsize * head_gradient
        gradient_rows = None
        if mixes(device, dtype):
            single = dtype == torch.bfloat16 and filter is None
            waiting = min(WAITING, tokens) * row_bytes // 2 * head_gradient if workspace_bytes is None else 0
            memory = _Memory(hidden, vocab, head_bytes, single, budget - scratch, max(head_bytes, waiting))
            rows, gradient_rows, counted = memory.shared_out(max(tokens, 1), batch_invariant)
        else:
            rows = max(1, _rounded(max((budget - scratch) // row_bytes, least)))
            rows = min(rows, FILLED_ROWS) if batch_invariant else max(1, min(rows, tokens))
            widened = vocab * hidden * itemsize * (dtype.itemsize < itemsize)
            counted = rows * row_bytes + head_bytes * (dtype.itemsize < itemsize) + widened
        if batch_invariant:  # nothing may depend on the number of tokens, nor a row on its place in a block
            block_rows = math.gcd(rows, 2 ** int(math.log2(block_rows)))
        if filter:
            gathered = round(((gradient_rows or rows) * row_bytes + 2 * vocab * hidden * itemsize) * filter.columns)
            counted += gathered
        return cls(
            backend="triton" if triton else "torch",
            chunk_rows=rows,
            gradient_rows=gradient_rows,
            block_rows=min(block_rows, rows),
            passes=passes,
            compact=compact,
            batch_invariant=batch_invariant,
            filter=filter,
            workspace_bytes=counted + scratch,
        )

    def check(self, input: torch.Tensor, compute: torch.dtype) -> None:  # (..., H)
        """A plan made by hand may ask for Triton where it cannot run."""
        if self.backend != "triton":
            return
        if compute == torch.float64:
            raise TypeError("Plan(backend='triton') works in fp32, but input is fp64: use backend='torch'")
        if input.device.type not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"Plan(backend='triton'), but input is on {input.device}: move it to a GPU, use backend='torch', or "
                "set TRITON_INTERPRET=1 before importing triton, to run its interpreter"
            )

    @property
    def row_ops(self) -> RowOps:
        """Those of the backend, imported when first asked for: Triton is optional."""
        if self.backend == "torch":
            from .rows.torch_rows import TorchRows

            return TorchRows(self.block_rows)
        try:
            from .rows.triton_rows import TritonRows
        except ImportError as error:
            raise ImportError("the triton row backend needs triton ≥ 3.6: pip install triton") from error
        return TritonRows()

    def chunks(self, rows: int) -> Iterator[slice]:
        """Slices that cut `rows` rows into the fewest chunks, as equal as whole tiles of the products allow.

        Every chunk then starts at an aligned address of each annotation too, for which kernels are compiled once.
        """
        count, step = -(-rows // self.chunk_rows), _step(self.chunk_rows)
        size = -(-rows // max(count, 1))
        return _cut(rows, min(self.chunk_rows, -(-size // step) * step))

    def groups(self, rows: int) -> Iterator[slice]:
        """Slices that cut `rows` rows into those whose dx and dW are multiplied at once."""
        return self.chunks(rows) if self.gradient_rows is None else _cut(rows, self.gradient_rows)

    def __str__(self) -> str:
        passes = {None: "one pass where the objective allows", 1: "one pass", 2: "two passes"}[self.passes]
        passes += ", batch-invariant" * self.batch_invariant
        passes += f", {self.filter.columns:.1%} of the columns in the backward" if self.filter else ""
        memory = f", {self.workspace_bytes / 1e6:.1f} MB of workspace" if self.workspace_bytes else ""
        gradients = f", gradients of {self.gradient_rows}" if self.gradient_rows else ""
        return f"{self.backend} rows, chunks of {self.chunk_rows} tokens{gradients}, {passes}{memory}"


@dataclass(frozen=True)
class _Memory:
    """What 16-bit products with fp32 results have to share: logits in fp32 beside their gradients in 16 bits.

    head    bytes of dW's sum in fp32, 0 where nobody wants it
    single  whether one product makes dW without that sum
    budget  bytes for logits and gradients beside that sum
    beside  bytes for the sum or, without it, for more gradients
    """

    hidden: int
    vocab: int
    head: int
    single: bool
    budget: int
    beside: int

    def shared_out(self, tokens: int, batch_invariant: bool) -> tuple[int, int, int]:
        """(logits rows, gradient rows, bytes in use)"""
        row = aligned_size(max(self.vocab, 1))
        logits, gradient = 4 * row, 2 * row
        products = 6 * self.hidden  # of a gradient row: its hidden states once more, and dx in fp32
        least = max(1, min(LEAST_LOGITS, self.budget // logits, tokens))
        total = 0 if self.single else self.head
        if batch_invariant:  # every product of the same size
            rows = _rounded(max(1, min(MOST_LOGITS, self.budget // (logits + gradient + products))))
            return rows, rows, rows * (logits + gradient + products) + self.head
        chunk = (self.budget + self.beside - total - tokens * (gradient + products)) // logits
        if chunk >= least:  # dx and dW of all tokens at once
            chunk = _rounded(min(chunk, MOST_LOGITS, tokens))
            return chunk, tokens, chunk * logits + tokens * (gradient + products) + total
        room = self.budget + self.beside - self.head
        chunk = _rounded(max(1, min(SHARED_LOGITS, room // (logits + gradient + products))))
        rows = max(chunk, (room - chunk * logits) // (gradient + products))
        if self.single and self.head:  # gradients may wait in the memory of the dW that is returned
            free = min(self.vocab * self.hidden // row, (room - least * logits) // products)
            if free > rows:
                chunk, rows, gradient = _rounded(min((room - free * products) // logits, MOST_LOGITS)), free, 0
        if rows < tokens:
            fewest = -(-tokens // rows)  # each reads and writes dW's sum once more
            rows = _filling(-(-tokens // fewest) if self.head else 3 * rows // 4, rows, self.hidden)
        rows = min(rows, tokens)
        chunk = min(chunk, rows)
        return chunk, rows, chunk * logits + rows * (gradient + products) + self.head


def _filling(least: int, most: int, hidden: int) -> int:
    """Rows, between `least` and `most`, whose dx leaves the fewest multiprocessors idle at the end."""

    def full(rows: int) -> float:
        tiles = rows // TILE[0] * -(-hidden // TILE[1])
        return tiles / (-(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS)

    most = _rounded(most)
    return max(range(most, max(least, TILE[0]) - 1, -TILE[0]), key=full, default=most)


def _cut(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, max(size, 1)):
        yield slice(start, min(start + size, rows))


def _rounded(rows: int) -> int:
    return rows // _step(rows) * _step(rows)


def _step(rows: int) -> int:
    """What the number of rows of a chunk of about so many is to be a multiple of."""
    return 128 if rows >= 256 else 16 if rows >= 16 else 1


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there without being asked for: where Triton is installed, but not in fp64."""
    return device.type in TRITON_DEVICES and dtype != torch.float64 and has_triton()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
