"""What the loss head has to cost by arithmetic, before anything is measured: the tables of docs/kernel-notes.md.

    python -m bench.costs            print them
    python -m bench.costs FILE       put them into FILE, between markers

Ceilings are assumptions about an H200, to be replaced by what a run on one gives. `Cost` counts for one call: products
at the matrix rate, and, one after the other with them, the bytes that no product can hide: the row kernels' reads and
writes and the rounding of dW. Time within a product is not counted: its own bytes are compared with its time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from srft_kernels import Plan

from .cases import Shape

MATRIX = 790e12  # flop/s of a bf16 product
MEMORY = 4.3e12  # byte/s of a copy, reads and writes counted
MULTIPROCESSORS, CLOCK = 132, 1.7e9  # each issues 4 warp instructions a cycle, so 128 lanes'
L2 = 60e6

SHAPES = [Shape(8192, 4096, 151936), Shape(8192, 3584, 152064), Shape(32768, 4096, 151936),
          Shape(8192, 2048, 151936), Shape(8192, 896, 151936)]  # fmt: skip
# plan: products of 2NHV, bytes per logit of the row kernels (each read from memory), whether dW is made
PLANS = {"one pass": (3, 4 + 4 + 2, True), "frozen head": (2, 4 + 4 + 2, False), "scoring": (1, 4, False),
         "two pass": (4, 4 + 4 + 2, True)}  # fmt: skip
TARGETS = {
    ("one pass", 4096): 0.92, ("one pass", 3584): 0.92, ("one pass", 2048): 0.85, ("one pass", 896): 0.70,
    ("scoring", 4096): 0.93, ("scoring", 3584): 0.93, ("two pass", 4096): 0.90, ("two pass", 3584): 0.90,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One call in seconds. `from_l2`: a row's second read costs nothing."""

    plan: str
    shape: Shape
    from_l2: bool = False

    @property
    def products(self) -> float:
        n, h, v = self.shape.tokens, self.shape.hidden, self.shape.vocab
        return 2 * PLANS[self.plan][0] * n * h * v / MATRIX

    @property
    def rows(self) -> float:
        per_logit = PLANS[self.plan][1]
        if self.from_l2 and self.plan in ("one pass", "frozen head"):
            per_logit -= 4
        return per_logit * self.shape.tokens * self.shape.vocab / MEMORY

    @property
    def rounding(self) -> float:
        """dW from the fp32 sum to bf16."""
        return PLANS[self.plan][2] * 6 * self.shape.hidden * self.shape.vocab / MEMORY

    @property
    def ratio(self) -> float:
        return self.products / (self.products + self.rows + self.rounding)

    @property
    def chunk(self) -> tuple[int, int]:
        """(chunks, rows of one)."""
        n, h, v = self.shape.tokens, self.shape.hidden, self.shape.vocab
        chunks = len(list(Plan.choose(n, h, v, torch.bfloat16, "cuda").chunks(n)))
        return chunks, n // chunks


def accumulation(rows: int) -> float:
    """Of dW += dzᵀ x over a chunk: time to read and write the fp32 sum, over the time of the product. For any H, V."""
    return (8 / MEMORY) / (2 * rows / MATRIX)


def issue(instructions: float, shape: Shape) -> float:
    """Seconds to issue so many instructions per logit, at best."""
    return instructions * shape.tokens * shape.vocab / (MULTIPROCESSORS * 128 * CLOCK)


def tables() -> str:
    lines = [
        "| plan | N, H, V | products | rows | with L2 | dW to bf16 | products over all, at best | with L2 | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        for shape in SHAPES:
            cost, l2 = Cost(plan, shape), Cost(plan, shape, from_l2=True)
            l2_cells = (f"{1e3 * l2.rows:.2f}", f"{l2.ratio:.3f}") if l2.rows < cost.rows else ("–", "–")
            target = TARGETS.get((plan, shape.hidden))
            cells = (plan, f"{shape.tokens}, {shape.hidden}, {shape.vocab}", f"{1e3 * cost.products:.2f}",
                     f"{1e3 * cost.rows:.2f}", l2_cells[0], f"{1e3 * cost.rounding:.2f}", f"{cost.ratio:.3f}",
                     l2_cells[1], f"≥ {target:.2f}" if target else "–")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Milliseconds; with L2: a row's second read is free. The fp32 sum of dW is read and written once per chunk:",
        "",
        "| N, H, V | chunks | rows of one | traffic of the sum | over the time of dW's products |",
        "|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        chunks, rows = Cost("one pass", shape).chunk
        traffic = (2 * chunks - 1) * 4 * shape.hidden * shape.vocab
        lines.append(
            f"| {shape.tokens}, {shape.hidden}, {shape.vocab} | {chunks} | {rows} | {traffic / 1e9:.1f} GB, "
            f"{1e3 * traffic / MEMORY:.2f} ms | {accumulation(rows):.2f} |"
        )
    return "\n".join(lines)


def put(path: Path) -> None:
    begin, end = "<!-- costs: made by `python -m bench.costs docs/kernel-notes.md` -->", "<!-- end of costs -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{tables()}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    put(Path(sys.argv[1])) if len(sys.argv) > 1 else print(tables())
