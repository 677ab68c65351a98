"""What a plain call costs now and at another commit, in turns: options not asked for should cost nothing.

    python -m bench.before COMMIT [--device cpu] [--seconds 20]

Loss with all gradients, cross-entropy and SRFT, of a chunk's worth of tokens and of so few that launches count.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import srft_kernels

from . import timing
from .cases import Case, Shape
from .environment import ROOT
from .inputs import Inputs, make
from .measure import default_dtype

SHAPES = {
    "cpu": (Shape(256, 576, 49152), Shape(64, 64, 4096)),
    "cuda": (Shape(8192, 4096, 151936), Shape(64, 896, 151936)),
}
OBJECTIVES = ("sft", "srft_paper")
READ = ("advantages", "is_demo", "rewards")  # of the inputs' annotations, by the latter


def package_at(commit: str, directory: str) -> ModuleType:
    """srft_kernels as it was, under another name. Raises CalledProcessError for a commit that is not there."""
    command = ["git", "-C", str(ROOT), "archive", commit, "srft_kernels"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(directory, filter="data")
    path = Path(directory) / "srft_kernels"
    spec = importlib.util.spec_from_file_location(
        "srft_kernels_before", path / "__init__.py", submodule_search_locations=[str(path)]
    )
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def call_of(package: ModuleType, name: str) -> Callable[[Inputs], Any]:
    objective = getattr(package, name)()
    read = READ if name.startswith("srft") else ()

    def run(inputs: Inputs) -> Any:
        inputs = inputs.leaves(False)
        columns = {column: inputs.columns[column] for column in read}
        loss = package.linear_loss(inputs.input, inputs.weight, inputs.target, objective, **columns).loss
        return torch.autograd.grad(loss, (inputs.input, inputs.weight))

    return run


def compare(before: ModuleType, device: str, seconds: float) -> list[tuple[str, int, float, float]]:
    """(what, rounds, median of the ratios of now to before, how far it may be off over it) of every plain call."""
    found = []
    for shape in SHAPES[timing.kind_of(device)]:
        inputs = make(Case("before", "srft", shape, "peaked"), device, default_dtype(device))
        copies = timing.rotation(inputs, device)
        for name in OBJECTIVES:
            calls = {"before": call_of(before, name), "now": call_of(srft_kernels, name)}
            first, _ = timing.take_turns(calls, copies, device, 3)  # compiles and warms up
            rounds = max(timing.BLOCKS, round(seconds / sum(map(min, first.values()))))
            times, failed = timing.take_turns(calls, copies, device, rounds)
            if failed:
                raise RuntimeError("; ".join(f"{which}: {why}" for which, why in failed.items()))
            found.append((f"{name} {shape}", rounds, *timing.ratio(times["now"], times["before"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.before", description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="of this repository")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds for each call")
    options = parser.parse_args()
    if timing.kind_of(options.device) == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as directory:
        try:
            before = package_at(options.commit, directory)
        except subprocess.CalledProcessError as error:
            parser.error(f"no srft_kernels at {options.commit}: {error.stderr.decode().strip()}")
        for what, rounds, ratio, off in compare(before, options.device, options.seconds):
            print(f"{what:<32} {ratio:6.3f} ±{off:.1%} of its time at {options.commit}, {rounds} rounds")


if __name__ == "__main__":
    main()
