"""Where a run was made: with which code, on which machine. What a published number needs beside it."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srft.model import LoadedModel

HERE = Path(__file__).resolve().parent


def origin(loaded: "LoadedModel") -> dict[str, str]:
    """What is known of the code and the machine of this process, and of which type its model is, as text by name."""
    import torch
    import transformers

    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = f"{os.cpu_count()} × {processor()}"
    if loaded.device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(loaded.device)}, {machine}"
    try:
        version = importlib.metadata.version("srft-kernels")
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        version = ""
    return {
        "srft": version,
        "commit": commit(),
        **packages,
        "python": platform.python_version(),
        "machine": machine,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "command": " ".join(["srft", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit() -> str:
    """That of the repository which srft runs from, with + where files in it are changed; "" where it is installed."""
    git = ["git", "-C", str(HERE)]
    try:
        top, head = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.split("\n")[:2]
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return head[:12] + "+" * bool(changed) if Path(top) == HERE.parent else ""


def processor() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()
