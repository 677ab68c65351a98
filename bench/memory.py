"""Peak memory of a call above what the process held before it.

    python -m bench.memory           the SRFT loss with all gradients, N=2048 H=576 V=49152, and eager cross-entropy

On CUDA the peak of torch's allocator, and on top what the call took from the driver around it; on CPU the resident size
of the process. Both of the latter are read every millisecond meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .cases import Case, Shape
from .inputs import make
from .peers import eager
from .providers import ours

PAGE = 4096
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SMALL, LARGE = 128 * 2**10, 32 * 2**20  # the first value of the latter, and its last


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory that the process (CUDA: the device for it) held during `call`, above what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outside = highest(lambda: outside_bytes(device), lambda: (call(), torch.cuda.synchronize()))
        return torch.cuda.max_memory_allocated() - before + outside
    with every_block_on_its_own():
        return highest(resident_bytes, call)


def highest(read: Callable[[], int], call: Callable[[], object]) -> int:
    """The largest value that `read` had during `call`, above the one before it."""
    before, most, done = read(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, read())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0, max(most, read()) - before)


def outside_bytes(device: torch.device | str) -> int:
    """Device memory that torch's allocator knows nothing of: contexts, code, and what packages asked the driver for.

    0 on a CPU. Other processes on the device count too, so only differences mean anything, and only where it is ours.
    """
    if torch.device(device).type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@contextlib.contextmanager
def every_block_on_its_own() -> Iterator[None]:
    """Have glibc map every block above 128 KiB by itself, and so give it back when it is freed.

    Left alone, glibc raises that threshold to the largest block freed so far (up to 32 MiB) and keeps smaller ones:
    what the process seems to take then depends on what ran before. Afterwards the threshold stays at the 32 MiB that a
    program with large tensors gets to, and that of trimming at its double, as glibc would have it: with the 128 KiB
    that it starts with, tensors that happen to lie at the end of the heap would be fresh pages at every call, others
    not. Memory freed before goes back to the system first: a call that fills it again would seem to take nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, SMALL)
        libc.mallopt(M_TRIM_THRESHOLD, SMALL)
        libc.malloc_trim(0)
    except AttributeError:  # not glibc
        yield
        return
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE)


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
