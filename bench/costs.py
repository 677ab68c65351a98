"""What the loss head has to cost by arithmetic, before anything is measured: the tables of docs/kernel-notes.md.

    python -m bench.costs            print them
    python -m bench.costs FILE       put them into FILE, between markers

Ceilings are assumptions about two cards, to be replaced by what a run on one gives. A call is its products at the
matrix rate, their waves counted, and what no product hides: the row kernels' bytes, the rounding of dW's fp32 sum, and
a share of what the products' epilogues move. The floor is the three products alone, on all tokens at once.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from srft_kernels import Plan

from .cases import Shape

MULTIPROCESSORS, CLOCK = 132, 1.7e9  # each issues 4 warp instructions a cycle, so 128 lanes'
TILE_ROWS, TILES = 128, {256: 1.0, 208: 0.945, 128: 0.9}  # of a product's output: by width, share of the full rate
SPLIT_ROOM = 32 * 2**20  # bytes that cuBLAS has for the fp32 parts of a product cut along K
ROWS_IN_FLIGHT = 2 * MULTIPROCESSORS  # a program per row, two to a multiprocessor
SUM_EXPOSED, LOGITS_EXPOSED = 0.5, 0.25  # of what the epilogues of dW += … and of the logits move, not hidden
SECOND_READ = 0.6 * 4  # bytes a logit from memory: read backwards, with hints, the rest is taken to come from L2

SHAPES = [Shape(8192, 4096, 151936), Shape(8192, 3584, 152064), Shape(32768, 4096, 151936),
          Shape(8192, 2048, 151936), Shape(8192, 896, 151936)]  # fmt: skip
# plan: (products for the logits, bytes per logit of the row kernels, whether dx and dW are made)
PLANS = {"one pass": (1, 4 + SECOND_READ + 2, True, True), "frozen head": (1, 4 + SECOND_READ + 2, True, False),
         "scoring": (1, 4, False, False), "two pass": (2, 4 + 4 + 2, True, True)}  # fmt: skip
TARGETS = {
    ("one pass", 4096): 0.92, ("one pass", 3584): 0.92, ("one pass", 2048): 0.85, ("one pass", 896): 0.70,
    ("scoring", 4096): 0.93, ("scoring", 3584): 0.93, ("two pass", 4096): 0.90, ("two pass", 3584): 0.90,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    name: str
    matrix: float = 790e12  # flop/s of a bf16 product
    memory: float = 4.3e12  # byte/s of a copy, reads and writes counted


CARDS = Card("H100", memory=3.0e12), Card("H200", memory=4.3e12)


@dataclass(frozen=True)
class Cost:
    """One call in seconds."""

    plan: str
    shape: Shape
    card: Card

    @property
    def chosen(self) -> Plan:
        shape, head_gradient = self.shape, PLANS[self.plan][3]
        size = shape.tokens, shape.hidden, shape.vocab
        return Plan.choose(*size, torch.bfloat16, "cuda", head_gradient=head_gradient or self.plan == "scoring")

    @property
    def groups(self) -> list[int]:
        """Rows of each pair of backward products."""
        return [rows.stop - rows.start for rows in self.chosen.groups(self.shape.tokens)]

    @property
    def chunks(self) -> list[int]:
        """Rows of each piece of logits."""
        pieces = (self.chosen.chunks(rows) for rows in self.groups)
        return [rows.stop - rows.start for group in pieces for rows in group]

    @property
    def summed(self) -> bool:
        """Whether dW is a sum in fp32 over several products."""
        return PLANS[self.plan][3] and len(self.groups) > 1

    def product(self, rows: int, columns: int, inner: int) -> float:
        """(rows, inner) · (inner, columns) by the best tile: in whole waves, cut along K where the parts have room."""
        splits = range(1, max(1, min(8, SPLIT_ROOM // (4 * rows * columns))) + 1)
        return min(self._tiled(rows, columns, inner, width, split) for width in TILES for split in splits)

    def _tiled(self, rows: int, columns: int, inner: int, width: int, split: int) -> float:
        tiles = split * math.ceil(rows / TILE_ROWS) * math.ceil(columns / width)
        of_tile = 2 * TILE_ROWS * width * inner / split / (TILES[width] * self.card.matrix / MULTIPROCESSORS)
        return math.ceil(tiles / MULTIPROCESSORS) * of_tile

    def three(self, chunks: list[int], groups: list[int]) -> float:
        """The products of a call whose tokens are cut so."""
        (logits, _, dx, dw), h, v = PLANS[self.plan], self.shape.hidden, self.shape.vocab
        time = logits * sum(self.product(rows, v, h) for rows in chunks)
        time += dx * sum(self.product(rows, h, v) for rows in groups)
        return time + dw * sum(self.product(v, h, rows) for rows in groups)

    @property
    def floor(self) -> float:
        return self.three([self.shape.tokens], [self.shape.tokens])

    @property
    def products(self) -> float:
        return self.three(self.chunks, self.groups)

    @property
    def epilogues(self) -> float:
        """What products do not hide of the logits they write and of the sum they read and write."""
        logits = 4 * PLANS[self.plan][0] * self.shape.tokens * self.shape.vocab
        total = (2 * len(self.groups) - 1) * 4 * self.shape.vocab * self.shape.hidden * self.summed
        return (LOGITS_EXPOSED * logits + SUM_EXPOSED * total) / self.card.memory

    @property
    def rows(self) -> float:
        """The row kernels: of a last, part-filled wave of programs half is lost."""
        whole = PLANS[self.plan][1] * self.shape.tokens * self.shape.vocab / self.card.memory
        return whole * (1 + waves(self.chunks[0], ROWS_IN_FLIGHT)) / 2

    @property
    def rounding(self) -> float:
        """dW from its fp32 sum to bf16."""
        return 6 * self.shape.hidden * self.shape.vocab * self.summed / self.card.memory

    @property
    def ratio(self) -> float:
        return self.floor / (self.products + self.epilogues + self.rows + self.rounding)


def waves(parts: int, places: int) -> float:
    """Time of so many parts over that of the same work with every place taken to the end."""
    return math.ceil(parts / places) * places / parts


def issue(instructions: float, shape: Shape) -> float:
    """Seconds to issue so many instructions per logit, at best."""
    return instructions * shape.tokens * shape.vocab / (MULTIPROCESSORS * 128 * CLOCK)


def tables() -> str:
    lines = [
        "| plan | N, H, V | logits, gradient rows | floor | products | epilogues | rows | dW to bf16 "
        "| floor over all | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        for shape in SHAPES:
            costs = [Cost(plan, shape, card) for card in CARDS]
            target = TARGETS.get((plan, shape.hidden))
            cells = [plan, f"{shape.tokens}, {shape.hidden}, {shape.vocab}"]
            cells += [f"{costs[0].chunks[0]}, {costs[0].groups[0] if PLANS[plan][2] else '–'}"]
            for part in ("floor", "products", "epilogues", "rows", "rounding"):
                cells.append(" / ".join(dict.fromkeys(f"{1e3 * getattr(cost, part):.2f}" for cost in costs)))
            cells.append(" / ".join(f"{cost.ratio:.3f}" for cost in costs))
            cells.append(f"≥ {target:.2f}" if target else "–")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(path: Path) -> None:
    begin, end = "<!-- costs: made by `python -m bench.costs docs/kernel-notes.md` -->", "<!-- end of costs -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{tables()}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    put(Path(sys.argv[1])) if len(sys.argv) > 1 else print(tables())
