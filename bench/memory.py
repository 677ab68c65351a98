"""Peak memory of a call above what it returns.

    python -m bench.memory           the SRFT loss with all gradients, N=2048 H=576 V=49152, and eager cross-entropy

On CUDA the peak of the allocator; on CPU the resident size of the process, sampled every millisecond meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import srft_kernels as sk

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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def loss_and_gradients(name: str, tokens: int, hidden: int, vocab: int) -> Callable[[], list[Tensor]]:
    """A call that returns (dx, dW): "srft" is this package with its default plan, "eager" PyTorch with full logits."""
    x = torch.randn(tokens, hidden).requires_grad_()
    weight = (torch.randn(vocab, hidden) / 20).requires_grad_()
    target = torch.randint(vocab, (tokens,))
    advantages, is_demo = torch.randn(tokens), torch.rand(tokens) < 0.3
    columns = {"advantages": advantages, "is_demo": is_demo, "rewards": (advantages > 0).float()}

    def run() -> list[Tensor]:
        if name == "srft":
            loss = sk.linear_loss(x, weight, target, sk.srft_paper(), **columns).loss
        else:
            loss = F.cross_entropy(F.linear(x, weight), target)
        return list(torch.autograd.grad(loss, (x, weight)))

    return run


def main() -> None:
    if len(sys.argv) == 1:  # each in a process of its own: what one leaves behind in the allocator hides the other
        for name in ("srft", "eager"):
            subprocess.run([sys.executable, "-m", "bench.memory", name], check=True)
        return
    torch.manual_seed(0)
    torch.set_num_threads(2)
    loss_and_gradients(sys.argv[1], 64, 64, 512)()  # threads and library buffers
    call, returned = loss_and_gradients(sys.argv[1], 2048, 576, 49152), []
    peak = peak_bytes(lambda: returned.extend(call()))
    size = sum(gradient.numel() * gradient.element_size() for gradient in returned)
    print(f"{sys.argv[1]:<6} peak {peak / 1e6:7.1f} MB, {(peak - size) / 1e6:7.1f} MB above the returned gradients")


if __name__ == "__main__":
    main()
