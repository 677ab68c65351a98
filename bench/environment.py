"""What a measurement has to name: device, driver, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "liger-cute-kernels", "cut-cross-entropy",
            "quack-kernels", "verl", "trl")  # fmt: skip


def environment(device: str, command: str) -> dict[str, str | int | dict[str, str]]:
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "kind": "cuda" if cuda else "cpu",
        "driver": driver() if cuda else "none",
        "cuda": torch.version.cuda or "none" if cuda else "none",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
        "command": command,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver() -> str:
    lines = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else "unknown"


def commit() -> str:
    """The commit, with + where the code differs from it; $COMMIT where there is no repository to ask."""
    found = output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if found == "unknown":
        return os.environ.get("COMMIT", "unknown")
    code = ("srft_kernels", "srft", "bench", ":!bench/results")  # results are what a run writes
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", *code)
    return found + "+" * (changed not in ("", "unknown"))


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
