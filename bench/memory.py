"""Peak memory of a call above what the process held before it.

    python -m bench.memory           the SRFT loss with all gradients, N=2048 H=576 V=49152, and eager cross-entropy

On CUDA the peak of the allocator; on CPU the resident size of the process, sampled every millisecond meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import Case, Shape
from .inputs import make
from .peers import eager
from .providers import ours

PAGE = 4096


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory that the process (CUDA: the allocator) held during `call`, above what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return_free_memory()
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident_bytes()) - before


def return_free_memory() -> None:
    """Give freed heap back to the system: a call that fills it again would seem to take nothing."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    providers = {"srft": (ours, "srft"), "eager": (eager, "cross entropy")}
    if len(sys.argv) == 1:  # each in a process of its own, as in a user's program
        for name in providers:
            subprocess.run([sys.executable, "-m", "bench.memory", name], check=True)
        return
    torch.set_num_threads(2)
    provider, task = providers[sys.argv[1]]
    call = provider("cpu").call(task)
    call(make(Case("", task, Shape(64, 64, 512)), "cpu", torch.float32))  # threads and library buffers
    inputs = make(Case("", task, Shape(2048, 576, 49152)), "cpu", torch.float32)
    returned: list[dict] = []
    peak = peak_bytes(lambda: returned.append(call(inputs)))
    size = sum(returned[0][name].nbytes for name in ("dx", "dW"))
    print(f"{sys.argv[1]:<6} peak {peak / 1e6:7.1f} MB, {(peak - size) / 1e6:7.1f} MB above the returned gradients")


if __name__ == "__main__":
    main()
