"""Which files of srft_kernels a call enters: `python -m tests.srft_kernels.way_through`.

linear_cross_entropy, forward and backward, on a CPU, with PyTorch rows and with Triton's. The latter run in Triton's
interpreter, where device code is Python too: files that are device code alone do not count, since a GPU enters none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch

import srft_kernels as sk

PACKAGE = Path(sk.__file__).parent
DEVICE_CODE = ("rows/triton_kernels.py",)


def entered(backend: str) -> dict[str, set[str]]:
    """{file: functions of it} of one call and its backward."""
    x, w = (torch.randn(n, 8, requires_grad=True) for n in (6, 40))
    target = torch.randint(40, (6,))
    plan = None if backend == "torch" else sk.Plan(backend=backend)  # on a CPU the former is what is chosen
    functions: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents and frame.f_code.co_name != "<module>":
            functions.setdefault(str(path.relative_to(PACKAGE)), set()).add(f"{frame.f_code.co_name}:{frame.f_lineno}")

    sys.settrace(note)
    try:
        sk.linear_cross_entropy(x, w, target, plan=plan).backward()
    finally:
        sys.settrace(None)
    return {file: names for file, names in functions.items() if file not in DEVICE_CODE}


def main() -> None:
    for backend in ("torch", "triton"):
        functions = entered(backend)
        print(f"{backend}: {len(functions)} files, {sum(map(len, functions.values()))} functions")
        for file, names in sorted(functions.items()):
            print(f"    {file:<32} {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
