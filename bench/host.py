"""What a small call asks of the host: dispatched operations, kernels, and time, without a GPU.

    python -m bench.host [--seconds 2]

The call runs on a CPU as it would on CUDA: 16-bit products with fp32 results, Triton rows, nothing that looks at data.
Kernels of the package are counted and not run; PyTorch's own are run, and counted unless they are views or allocations.
`host` is the time of Python and of dispatching, with tensors so small that operations themselves take nothing: what is
left out is Triton's own launch (its binder and the driver) and the driver's work for PyTorch's kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import srft_kernels as sk

TOKENS, HIDDEN, VOCAB = 64, 16, 304
KERNELS = ("_loss_gradient_kernel", "_gradient_kernel", "_statistics_kernel", "_scale_kernel", "_prepare_kernel")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
aten = torch.ops.aten


class Counts(NamedTuple):
    """Of a forward or a backward: operations dispatched, kernels by name."""

    dispatches: int
    kernels: list[str]


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.dispatches, self.kernels = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.dispatches += 1
        name = function.overloadpacket.__name__
        if not function.is_view and name not in (*ALLOCATIONS, "_local_scalar_dense"):
            self.kernels.append(name)
        return function(*args, **(kwargs or {}))

    @property
    def counts(self) -> Counts:
        return Counts(self.dispatches, self.kernels)


class Products(TorchDispatchMode):
    """16-bit products with fp32 results, which a CPU has not: their results are whatever was in memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.mm.dtype:
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1], dtype=args[2])
        if function in (aten.mm.dtype_out, aten.addmm.dtype_out):
            return kwargs["out"]
        return function(*args, **(kwargs or {}))


class Launches:
    """In place of a Triton kernel: counts."""

    def __init__(self, name: str, counter: list[Counter]):
        self.name, self.counter = name, counter

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, **arguments: Any) -> None:
        for counter in self.counter:
            counter.kernels.append(self.name)


@contextlib.contextmanager
def mixing() -> Iterator[None]:
    """16-bit operands are not widened: who enters this brings products of them with fp32 results."""
    narrow = lambda device, compute: compute.itemsize == 2  # noqa: E731
    with mock.patch("srft_kernels.head.mixes", narrow), mock.patch("srft_kernels.plan.mixes", narrow):
        yield


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Calls on CPU tensors take the way of CUDA's."""
    changes = [
        mixing(),
        mock.patch("srft_kernels.checks.may_look", lambda *_: False),
        mock.patch("srft_kernels.engine.runs_triton", lambda *_: True),
        mock.patch("srft_kernels.filter.runs_triton", lambda *_: True),
        mock.patch("srft_kernels.plan.Plan.check", lambda *_: None),
    ]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


@contextlib.contextmanager
def counting(counter: list[Counter]) -> Iterator[None]:
    """The same, without running Triton's kernels."""
    kernels = {name: Launches(name, counter) for name in KERNELS}
    with as_on_cuda(), mock.patch.multiple("srft_kernels.rows.triton_rows", **kernels):
        yield


def call(objective: Any, masked: bool) -> Callable[[], torch.Tensor]:
    """What makes the loss of a small call with some tokens ignored, or none."""
    x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    w = torch.randn(VOCAB, HIDDEN).bfloat16().requires_grad_()
    target = torch.randint(VOCAB, (TOKENS,))
    target[::7] = -100
    annotations = {"advantages": torch.randn(TOKENS), "rewards": torch.ones(TOKENS), "is_demo": target % 2 == 0}
    given = {name: column for name, column in annotations.items() if name in objective.reads}
    plan = sk.Plan(backend="triton", chunk_rows=TOKENS, compact=False)
    return lambda: (
        sk.linear_loss(x, w, target, objective, plan=plan, ignore_index=-100 if masked else None, **given).loss
    )


def counted(objective: Any, masked: bool = True) -> tuple[Counts, Counts]:
    """(forward, backward) of a small call."""
    from srft_kernels.rows.triton_rows import scale_

    run, counter = call(objective, masked), []
    with counting(counter), Products():
        run()  # what is looked up once and kept
        with Counter() as forward:
            counter.append(forward)
            loss = run()
        one = torch.ones_like(loss)
        with Counter() as backward:
            counter[:] = [backward]
            scaled = mock.patch("srft_kernels.engine._scaled_", lambda gradient, _: scale_(gradient, one))
            with scaled:  # as for a tensor that is not on the CPU
                loss.backward(one)
    return forward.counts, backward.counts


def host_seconds(objective: Any, masked: bool, seconds: float) -> float:
    """Median of a forward and backward."""
    run, times = call(objective, masked), []
    instead = {
        "logits": lambda self, x, out: out,
        "product": lambda self, a, b: a.new_empty(a.shape[0], b.shape[1], dtype=self.dtype),
        "add_weight_gradient": lambda *_: None,
    }
    with counting([]), mock.patch.multiple("srft_kernels.head.HeadProducts", **instead):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 10:
            start = time.perf_counter()
            run().backward()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2)
    seconds = parser.parse_args().seconds
    print(f"{'':<28} {'forward':^22} {'backward':^22}\n{'':<28}" + " dispatches    kernels" * 2 + "    host µs")
    for name, objective in (("sft", sk.sft()), ("srft_paper", sk.srft_paper())):
        for masked in (True, False):
            cells = [f"{c.dispatches:>11} {len(c.kernels):>10}" for c in counted(objective, masked)]
            host = 1e6 * host_seconds(objective, masked, seconds)
            print(f"{name + (', some ignored' if masked else ''):<28}", *cells, f"{host:>10.0f}", sep="")


if __name__ == "__main__":
    main()
