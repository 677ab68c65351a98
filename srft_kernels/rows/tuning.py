"""Launch settings of the Triton row kernels, looked up in a table by kernel, device and size of the vocabulary.

Nothing is searched for while a model trains. tuning.json is the table, a list of rows; the first that fits is used:

    kernel     "statistics", "gradient", "loss_gradient", or "*"
    target     "sm_90", "gfx942", …, or "*"
    vocab      a power of two: for V up to it and above its half, where it was measured; null: any
    block      columns per loop step
    warps      per program
    programs   per multiprocessor (0.5: half as many), each walking over many rows; null: one program per row
    backward   whether loss_gradient reads a row the second time from its end, of which L2 is told to keep a third
    measured   device, time and versions; null where nobody has measured, and then `why` gives the reason

`python -m bench.tune` measures on the device that is there and puts its rows first. A row's sums are formed block by
block and warp by warp, so results are bitwise the same under one table, and differ by rounding between two.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuning.json")
KERNELS = ("statistics", "gradient", "loss_gradient")


@dataclass(frozen=True)
class Launch:
    """Columns per step, warps per program, programs per multiprocessor (None: a program per row), and whether a row's
    second read starts at its end."""

    block: int
    warps: int
    programs: float | None = None
    backward: bool = False

    def fitted(self, vocab: int) -> Launch:
        """For rows of `vocab` numbers: no larger a block than the row, and as many numbers per thread as before."""
        block = min(self.block, max(4, 1 << (vocab - 1).bit_length()))
        return replace(self, block=block, warps=max(1, self.warps * block // self.block))

    def grid(self, rows: int, device: torch.device) -> tuple[int]:
        return (rows if self.programs is None else min(rows, max(1, round(self.programs * multiprocessors(device)))),)


SETTINGS = tuple(setting.name for setting in fields(Launch))
_forced: Launch | None = None


def launch(kernel: str, vocab: int, target: str) -> Launch:
    """The settings of a kernel for rows of `vocab` logits on a target ("sm_90")."""
    return (_forced or _choose(kernel, vocab, target)).fitted(vocab)


@contextlib.contextmanager
def forced(settings: Launch) -> Iterator[None]:
    """These settings for every kernel, instead of the table's: to measure them, and for tests."""
    global _forced
    before, _forced = _forced, settings
    try:
        yield
    finally:
        _forced = before


@lru_cache
def target(device: torch.device) -> str:
    """What a device's code is compiled for; "cpu" in the interpreter, "xpu" for any of Intel's."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count


@lru_cache
def table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def reload() -> None:
    """Read the table again."""
    table.cache_clear()
    _choose.cache_clear()


@lru_cache
def _choose(kernel: str, vocab: int, target: str) -> Launch:
    for row in table():
        near = row["vocab"] is None or row["vocab"] / 2 < vocab <= row["vocab"]
        if near and row["kernel"] in (kernel, "*") and row["target"] in (target, "*"):
            return Launch(*(row[name] for name in SETTINGS))
    raise LookupError(f"{TABLE} has no row for the {kernel} kernel on {target}: its last row should be for any")
