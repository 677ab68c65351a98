"""Who can do a task: this package, and its peers (peers.py), behind one face.

A provider gives token statistics, from which any task's loss follows by a formula on n-long vectors, or a loss of its
own for some tasks, or both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import srft_kernels as sk

from .cases import BUDGETED_TASK, TASKS, Task
from .inputs import Inputs

Statistics = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # x, W, target → ℓ, H (or None)


@dataclass(frozen=True)
class Provider:
    """`load(device)` returns what it can do, or raises: Unavailable (not installed, not on this device), Changed."""

    name: str
    load: Callable[[str], Abilities]


@dataclass(frozen=True)
class Abilities:
    """losses: by task, (inputs, task) → scalar, or (scalar, ℓ, H).   statistics: None where only losses are given.

    entropy      whether the statistics have H
    compacts     whether ignored tokens never come to the statistics, because the peer's own callers take them out
    """

    losses: dict[str, Callable[[Inputs, Task], Any]] = field(default_factory=dict)
    statistics: Statistics | None = None
    entropy: bool = True
    compacts: bool = False

    def call(self, name: str) -> Callable[[Inputs], dict[str, Tensor | None]] | None:
        """What computes a task: results by name (loss, logprobs, entropy, dx, dW); None where this cannot."""
        task = TASKS[name]
        if task.objective is None:
            return None if self.statistics is None or not self.entropy else self._score
        loss = self.losses.get(name)
        if loss is None:
            reads_entropy = isinstance(task.objective, sk.SRFT)
            if self.statistics is None or (reads_entropy and not self.entropy):
                return None
            loss = self._loss_of_statistics

        def run(inputs: Inputs) -> dict[str, Tensor | None]:
            inputs = inputs.leaves(task.frozen)
            found = loss(inputs, task)
            value, logprobs, entropy = found if isinstance(found, tuple) else (found, None, None)
            dx, *dw = torch.autograd.grad(value, [inputs.input] if task.frozen else [inputs.input, inputs.weight])
            return {"loss": value, "logprobs": logprobs, "entropy": entropy, "dx": dx, "dW": dw[0] if dw else None}

        return run

    def _score(self, inputs: Inputs) -> dict[str, Tensor | None]:
        with torch.no_grad():
            logprobs, entropy = self.statistics(inputs.input, inputs.weight, inputs.target.clamp(min=0))
        return {"logprobs": logprobs, "entropy": entropy}

    def _loss_of_statistics(self, inputs: Inputs, task: Task) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mean of the objective over the live tokens. Peers know no ignored ones: they get target 0 there."""
        live = None if inputs.live_tokens == len(inputs.target) else inputs.live
        some = (lambda field: field) if live is None else (lambda field: field[live])  # which waits for the device
        tokens = sk.Tokens(some(inputs.target), **{name: some(column) for name, column in inputs.columns.items()})
        if self.compacts:
            found = self.statistics(some(inputs.input), inputs.weight, tokens.target)
        else:
            found = self.statistics(inputs.input, inputs.weight, inputs.target.clamp(min=0))
        of_live = [None if field is None else field if self.compacts else some(field) for field in found]
        logprobs = of_live[0].float()
        entropy = torch.zeros_like(logprobs) if of_live[1] is None else of_live[1].float()
        stats = sk.TokenStats(logprobs, entropy, torch.zeros_like(logprobs))  # nobody reads lse
        if self.compacts and live is not None:
            found = [None if field is None else spread(field.detach(), live) for field in found]
        return task.objective(stats, tokens).mean(), *found


def spread(values: Tensor, live: Tensor) -> Tensor:
    """Values of the live tokens at their places among all, 0 elsewhere."""
    return torch.zeros(len(live), dtype=values.dtype, device=values.device).masked_scatter(live, values)


def our_loss(inputs: Inputs, task: Task, plan: sk.Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    out = sk.linear_loss(
        inputs.input, inputs.weight, inputs.target, task.objective,
        live_tokens=inputs.live_tokens, plan=plan, **inputs.columns,
    )  # fmt: skip
    return out.loss, out.logprobs, out.entropy


def ours(device: str) -> Abilities:

    def statistics(x: Tensor, weight: Tensor, target: Tensor):
        stats = sk.linear_logprobs(x, weight, target)
        return stats.logprobs, stats.entropy

    return Abilities({name: our_loss for name, task in TASKS.items() if task.objective is not None}, statistics)


def filtered(device: str) -> Abilities:
    def loss(inputs: Inputs, task: Task):
        (n, hidden), vocab = inputs.input.shape, len(inputs.weight)
        plan = sk.Plan.choose(n, hidden, vocab, inputs.input.dtype, device, filter=sk.Filter())
        return our_loss(inputs, task, plan)

    return Abilities({name: loss for name, task in TASKS.items() if task.allowed})


def budgeted(device: str) -> Abilities:
    def loss(inputs: Inputs, task: Task):
        (n, hidden), vocab = inputs.input.shape, len(inputs.weight)
        plan = sk.Plan.choose(n, hidden, vocab, inputs.input.dtype, device, workspace_bytes=256 * 2**20)
        return our_loss(inputs, task, plan)

    return Abilities({BUDGETED_TASK: loss})


def compiled(device: str) -> Abilities:
    """A graph that holds nothing but our loss: what being in one costs."""
    return Abilities({"srft, in a graph": torch.compile(our_loss, fullgraph=True)})


OURS = Provider("srft_kernels", ours)
FILTERED = Provider("srft_kernels, filtered", filtered)
COMPILED = Provider("srft_kernels, compiled", compiled)
BUDGETED = Provider("srft_kernels, 256 MiB", budgeted)
OWN = (OURS, FILTERED, COMPILED, BUDGETED)
ALONE = "one process"  # beside the ranks of sharded.py: the same loss
SHORT_WAITS = "srft_kernels, short waits"  # of threads for work: in busy.py
UNSHARED, PADDED = "prompts of their own", "padded"  # beside packed rows with shared prompts: in packing.py
OUR_NAMES = (
    *(provider.name for provider in OWN),
    ALONE,
    SHORT_WAITS,
    UNSHARED,
    PADDED,
)  # no peers: where one of these is wrong, the run has failed


def bare_products(inputs: Inputs, task: Task) -> Callable[[Inputs], None]:
    """The floor: the task's matrix products on the live tokens and nothing else, in the inputs' type.

    In chunks only where the logits would not fit; on a CPU also where that is faster, which is tried here once. The
    operands are the case's own, since products of zeros run faster. dW accumulates in the inputs' type when there is
    more than one chunk.
    """
    live = inputs.live.nonzero()[:, 0]
    dx = torch.empty_like(inputs.input[live]) if task.products >= 2 else None
    dw = torch.empty_like(inputs.weight) if task.products >= 3 else None

    @torch.no_grad()
    def run(inputs: Inputs, logits: Tensor) -> None:
        x, w = inputs.input.detach(), inputs.weight.detach()
        x, rows = x if len(live) == len(x) else x[live], len(logits)
        for start in range(0, len(x), rows):
            chunk = x[start : start + rows]
            z = logits[: len(chunk)]
            torch.mm(chunk, w.t(), out=z)
            if task.products == 4:
                torch.mm(chunk, w.t(), out=z)
            if dx is not None:
                torch.mm(z, w, out=dx[start : start + rows])
            if dw is not None:
                torch.mm(z.t(), chunk, out=dw) if start == 0 else dw.addmm_(z.t(), chunk)

    def chunked(rows: int) -> Callable[[Inputs], None]:
        logits = inputs.input.new_empty(rows, len(inputs.weight))
        return lambda inputs: run(inputs, logits)

    tried = [chunked(rows) for rows in chunkings(len(live), len(inputs.weight), inputs.input)]
    return tried[0] if len(tried) == 1 else min(tried, key=lambda call: seconds_of(call, inputs))


def chunkings(tokens: int, vocab: int, like: Tensor) -> list[int]:
    """Rows per chunk worth trying: on a GPU the fewest chunks of up to 2³¹ logits, alike and of whole tiles."""
    if like.is_cuda:
        count = -(-tokens * vocab // 2**31)
        return [min(tokens, -(-tokens // (256 * count)) * 256)]
    most = max(1, 10**9 // (vocab * like.element_size()))
    return sorted({min(tokens, most), min(tokens, most, 512)})


def seconds_of(call: Callable[[Inputs], None], inputs: Inputs) -> float:
    call(inputs)  # touches its memory
    started = time.perf_counter()
    call(inputs)
    return time.perf_counter() - started
