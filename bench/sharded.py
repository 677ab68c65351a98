"""A head divided over ranks, `linear_loss(group=...)` in real processes, beside the same loss in one process.

On a CPU two ranks of one thread each, with gloo between them, and one process with as many threads; on CUDA a rank per
GPU, with NCCL, and one process with one GPU; nothing where there is one GPU alone. A call begins on all ranks together,
and takes as long as on the slowest. The floor of the ranks is the products with their own parts of the head, on all of
them at once and without a word between them; that of the process the products with the whole head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import srft_kernels as sk

from . import memory, timing
from .cases import HEADS, TASKS, Case, Shape, Task
from .inputs import Inputs, Unavailable, make
from .measure import (
    EVERYONE,
    Limits,
    Row,
    attempt,
    default_dtype,
    examine,
    judge,
    peaks,
    release,
    set_times,
    stage,
)
from .providers import ALONE, OURS, Abilities, bare_products
from .ranks import Ranks
from .timing import kind_of
from .truth import Truth, truth

SHAPES = {"cpu": Shape(256, 256, 16384), "cuda": Shape(8192, *HEADS["Qwen3-8B"])}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
NAMES = (OURS.name, ALONE)
FLOOR = "bare products"
STARTING, ANSWERING = 60.0, 30.0  # seconds: the patience with ranks that start, and with those that run
SPINNING = 0.005  # seconds for which threads that have nothing to do may still look for work

Timed = Callable[[Inputs], float]  # seconds of a call


def rank_count(device: str) -> int:
    return 2 if kind_of(device) == "cpu" else max(1, torch.cuda.device_count())


def sharded_case(device: str) -> Case:
    kind, count = kind_of(device), rank_count(device)
    each, alone = ("1 thread", f"{count} threads") if kind == "cpu" else ("1 GPU", "1 GPU")
    note = (
        f"{count} ranks over {BACKENDS[kind]} with {each} each, {ALONE} with {alone}; × products: of a rank's own rows"
    )
    return Case("sharded", "srft", SHAPES[kind], ours=True, note=f"{note} of the head; peak: of one rank")


def measure_sharded(
    device: str,
    rounds: int | None = None,
    limits: Limits | None = None,
    begin: Callable[[str], None] = lambda provider: None,
    left_out: Collection[str] = (),
) -> list[Row]:
    """A row for the ranks and one for one process, as `measure.measure`. Raises Unavailable, CaseFailed, ContextLost.

    A rank that ends, or does not answer in time, is a failure of the ranks' row.
    """
    case, kind, limits = sharded_case(device), kind_of(device), limits or Limits()
    if rank_count(device) < 2:
        raise Unavailable("a head is divided over two GPUs at least")
    others, threads = timing.Others(), torch.get_num_threads()
    rows: dict[str, Row] = {}
    calls: dict[str, Timed] = {}
    ranks = Ranks(rank_count(device), partial(settle, device), BACKENDS[kind], STARTING)
    try:
        if kind == "cpu":
            torch.set_num_threads(ranks.count)
        begin(EVERYONE)
        with stage("inputs", device):
            inputs = make(case, device, default_dtype(device))
        with stage("truth in fp64", device):
            reference = truth(inputs, TASKS[case.task])
        release(device)
        with stage("start of the ranks", device):
            ranks(ready, case, device)
        ranks.patience = min(ANSWERING, limits.each)
        for name, examined in ((OURS.name, partial(over_ranks, ranks)), (ALONE, alone)):
            if name in left_out:
                continue
            row = rows[name] = Row(case, name, "ok")
            begin(name)
            with attempt(row, device, limits):
                limits.check(name)
                call, floor = examined(row, inputs, reference, device, limits)
                if row.status == "ok":
                    calls |= {name: call, f"{FLOOR}, {name}": floor}
            release(device)
        begin(EVERYONE)
        times, failed = timing.take_turns(calls, [inputs], device, rounds, clock=lambda call, device: call())
    finally:
        ranks.stop()
        torch.set_num_threads(threads)
    busy = others.share()  # which takes the ranks for others until they have ended
    for name, row in rows.items():
        floor = f"{FLOOR}, {name}"
        if reason := failed.get(name) or failed.get(floor):
            row.status, row.reason = "failed", f"while it was timed: {reason}"
        elif name in times:
            set_times(row, times[name], times[floor], busy, device)
    return list(rows.values())


def alone(row: Row, inputs: Inputs, reference: Truth, device: str, limits: Limits) -> tuple[Timed, Timed]:
    """What times the call of one process and its floor; the row gets error and peak."""
    call = OURS.load(device).call(row.case.task)
    examine(row, call, inputs, reference, default_dtype(device), device, memory.outside_bytes(device), limits)
    floor = bare_products(inputs, TASKS[row.case.task])
    floor(inputs)

    def timed(call: Callable[[Inputs], Any], inputs: Inputs) -> float:
        return timing.seconds(lambda: call(inputs), device)

    return partial(timed, call), partial(timed, floor)


def over_ranks(
    ranks: Ranks, row: Row, inputs: Inputs, reference: Truth, device: str, limits: Limits
) -> tuple[Timed, Timed]:
    """The same for the ranks: their tokens' results are the first one's, the head's gradient lies in parts on all."""
    places = [reference.places[name] for name in ("dW", "dW others") if name in reference.places]
    entries = torch.cat([inputs.target[:0], *places]).unique()
    found = ranks(results, row.case, device, entries.cpu())
    dW = torch.zeros_like(inputs.weight)
    dW[entries] = torch.cat([result.pop("dW") for result in found]).to(device)
    whole = {name: value.to(device) for name, value in found[0].items()} | {"dW": dW}
    if judge(row, whole, reference, default_dtype(device)):
        peak, kept = map(max, zip(*ranks(peak_and_kept, row.case, device)))
        row.extra |= peaks(peak, 0, device) | {"returned_bytes": kept, "ranks": ranks.count}

    def timed(what: str, _: Inputs) -> float:
        time.sleep(SPINNING)
        return max(ranks(seconds, row.case, device, what))

    return partial(timed, OURS.name), partial(timed, FLOOR)


# What runs on the ranks


def settle(device: str, rank: int) -> None:
    if kind_of(device) == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)


@lru_cache(maxsize=1)
def part(case: Case, device: str) -> tuple[Inputs, dict[str, Callable[[Inputs], Any]]]:
    """(the case's inputs with this rank's rows of the head, what is timed with them)."""
    whole, task = make(case, device, default_dtype(device)), TASKS[case.task]
    inputs = replace(whole, weight=whole.weight[own(case)].clone())
    call = Abilities({case.task: sharded_loss}).call(case.task)
    return inputs, {OURS.name: call, FLOOR: bare_products(inputs, task)}


def own(case: Case) -> slice:
    rows, rank = case.shape.vocab, dist.get_rank()
    return slice(*(rows * edge // dist.get_world_size() for edge in (rank, rank + 1)))


def sharded_loss(inputs: Inputs, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    out = sk.linear_loss(
        inputs.input, inputs.weight, inputs.target, task.objective,
        live_tokens=inputs.live_tokens, group=dist.group.WORLD, **inputs.columns,
    )  # fmt: skip
    return out.loss, out.logprobs, out.entropy


def ready(case: Case, device: str) -> None:
    inputs, calls = part(case, device)
    for call in calls.values():  # touches its memory, connects the ranks
        call(inputs)


def results(case: Case, device: str, entries: Tensor) -> dict[str, Tensor]:
    """Of a call, with those rows of the head's gradient that are asked for and lie here."""
    inputs, calls = part(case, device)
    found, here = calls[OURS.name](inputs), own(case)
    places = entries[(entries >= here.start) & (entries < here.stop)] - here.start
    found["dW"] = found["dW"][places.to(device)]
    return {name: value.detach().cpu() for name, value in found.items()}


def peak_and_kept(case: Case, device: str) -> tuple[int, int]:
    """Bytes of a call: the peak above what it returns, which are the gradients, and these."""
    inputs, calls = part(case, device)
    held: list[dict[str, Tensor]] = []
    peak = memory.peak_bytes(lambda: held.append(calls[OURS.name](inputs)), device)
    kept = sum(held[0][name].nbytes for name in ("dx", "dW"))
    return peak - kept, kept


def seconds(case: Case, device: str, what: str) -> float:
    inputs, calls = part(case, device)
    dist.barrier()
    return timing.seconds(lambda: calls[what](inputs), device)
