"""Measure a case: every provider once for error and memory, then all of them and the floor in turns for time.

Nothing that goes wrong here ends a session: a provider's failure is its row, and what fails before the providers' turn
(inputs, truth) is the case's. Only a lost CUDA context does (timing.ContextLost).
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import memory, timing
from .cases import TASKS, Case
from .inputs import Inputs, Unavailable, make
from .providers import OUR_NAMES, OURS, OWN, Provider, bare_products
from .timing import kind_of
from .truth import Truth, truth

OURS_ALONE = (*OUR_NAMES, "eager")
EVERYONE = "all providers"  # stands for them in the row of a case that none of them could be measured on
GRACE = 5.0  # seconds past the deadline in which a provider may end what it has begun
OWN_CODE = 64 * 2**20  # bytes: less than this, taken from the driver in one case, is the kernels' code


@dataclass
class Row:
    """One provider on one case.

    status   "ok"; "wrong": past the tolerance, hence not timed; "failed": raised; "unavailable": not installed, or not
             for this device; "skipped": no time, or no inputs. `reason` says more.
    """

    case: Case
    provider: str
    status: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Limits:
    """Seconds. What is cut short or left out because of them is told in its row.

    deadline   of `time.perf_counter`, after which nothing is begun
    each       for one provider on one case before it is timed, compilation included; also for its first three rounds
    total      the same over all cases; what we compare (srft_kernels) always gets its turn
    """

    deadline: float = math.inf
    each: float = math.inf
    total: float = math.inf
    spent: Counter[str] = field(default_factory=Counter)

    def check(self, provider: str) -> None:
        """Raise TimeUp where the provider may not begin."""
        if time.perf_counter() > self.deadline:
            raise timing.TimeUp("no time left")
        if provider not in OUR_NAMES and self.spent[provider] > self.total:
            raise timing.TimeUp(f"has had its {self.total:g} s in the cases before")


class CaseFailed(Exception):
    """No provider could be measured on a case: what went wrong, and where."""


@contextlib.contextmanager
def stage(name: str, device: str) -> Iterator[None]:
    """Something that every provider needs. Raises CaseFailed for whatever goes wrong in it, but Unavailable."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        timing.check_context(device, f"{EVERYONE}, {name}", error)
        raise CaseFailed(f"{name}: {timing.told(error)}") from None


@contextlib.contextmanager
def attempt(row: Row, device: str, limits: Limits) -> Iterator[None]:
    """A provider's turn: what goes wrong becomes the status of its row. Raises ContextLost."""
    started = time.perf_counter()
    try:
        with timing.limit(min(limits.each, max(0.0, limits.deadline - started) + GRACE)):
            yield
    except Unavailable as error:
        row.status, row.reason = "unavailable", str(error)
    except timing.TimeUp as error:
        # ours is not slow: it hangs
        ours = row.provider == OURS.name and time.perf_counter() <= limits.deadline
        row.status, row.reason = "failed" if ours else "skipped", str(error)
    except Exception as error:  # a peer may fail in any way; it is told, and the others go on
        timing.check_context(device, row.provider, error)
        row.status, row.reason = "failed", timing.told(error)
    finally:
        limits.spent[row.provider] += time.perf_counter() - started


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: str,
    rounds: int | None = None,
    limits: Limits | None = None,
    begin: Callable[[str], None] = lambda provider: None,
) -> list[Row]:
    """A row per provider that has to do with the case; those that cannot do the task at all are left out.

    begin(who): told before each provider is tried. Raises Unavailable where the case's inputs are not there, CaseFailed
    where they or the truth cannot be made, ContextLost.
    """
    limits = limits or Limits()
    task, dtype = TASKS[case.task], default_dtype(device)
    begin(EVERYONE)
    with stage("inputs", device):
        inputs = make(case, device, dtype)
    with stage("truth in fp64", device):
        reference = truth(inputs, task)
    release(device)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[Inputs], Any]] = {}
    for provider in providers:
        if case.ours and provider.name not in OURS_ALONE:
            continue
        row = Row(case, provider.name, "ok")
        begin(provider.name)
        call = None
        with attempt(row, device, limits):
            limits.check(provider.name)
            outside = memory.outside_bytes(device)
            call = provider.load(device).call(case.task)
            if call is not None:
                examine(row, call, inputs, reference, dtype, device, outside, limits)
        if call is not None or row.status != "ok":
            rows[provider.name] = row
        if call is not None and row.status == "ok":
            calls[provider.name] = call
        release(device)
    del reference
    begin(EVERYONE)
    time_all(case, rows, calls, inputs, device, rounds)
    release(device)
    return list(rows.values())


def time_all(
    case: Case,
    rows: dict[str, Row],
    calls: dict[str, Callable[[Inputs], Any]],
    inputs: Inputs,
    device: str,
    rounds: int | None,
) -> None:
    """Add to the rows what comes of taking turns with each other and with the bare products."""
    if not calls:
        return
    kind, task, products = kind_of(device), TASKS[case.task], "bare products"
    with stage("bare matrix products", device):
        floor = bare_products(inputs, task)
        floor(inputs)
    with stage("copies of the inputs", device):
        copies = timing.rotation(inputs, device)
    others = timing.Others()
    times, failed = timing.take_turns({products: floor, **calls}, copies, device, rounds)
    busy = others.share()
    if products in failed:
        raise CaseFailed(f"bare matrix products: {failed[products]}")
    for name, reason in failed.items():
        rows[name].status, rows[name].reason = "failed", f"while it was timed: {reason}"
    floor_times = times.pop(products)
    for name, measured in times.items():
        set_times(rows[name], measured, floor_times, busy, device)
    if kind == "cuda" and not case.ours and OURS.name in times:
        with stage("hot L2", device):
            hot, hot_floor = (timing.hot_seconds(call, inputs, device) for call in (calls[OURS.name], floor))
        rows[OURS.name].extra |= {"hot_seconds": hot, "hot_products_seconds": hot_floor}


def set_times(row: Row, measured: list[float], floor: list[float], busy: float, device: str) -> None:
    """busy: the part of the processors' time that others took meanwhile."""
    middle, uncertainty = timing.ratio(measured, floor)
    row.seconds = measured
    row.extra |= {
        "ratio_to_products": middle,
        "tflops": row.case.flops / statistics.median(measured) / 1e12,
        "products_seconds": statistics.median(floor),
    } | timing.noise(uncertainty, busy, device)


def examine(
    row: Row,
    call: Callable[[Inputs], Any],
    inputs: Inputs,
    reference: Truth,
    dtype: torch.dtype,
    device: str,
    outside: int,
    limits: Limits,
) -> None:
    """Error against fp64, and the peak of a second call, above inputs and returned gradients.

    outside: what `memory.outside_bytes` was before the provider was loaded.
    """
    results = call(inputs)  # compiles, tunes, warms up
    right = judge(row, results, reference, dtype)
    kept = sum(t.numel() * t.element_size() for name in ("dx", "dW") if (t := results.get(name)) is not None)
    if not right:
        return
    del results
    release(device)
    taken = memory.outside_bytes(device) - outside
    OUTSIDE[row.provider] += taken if taken > OWN_CODE else 0
    held: list[Any] = []
    started = time.perf_counter()
    peak = memory.peak_bytes(lambda: held.append(call(inputs)), device)
    took = time.perf_counter() - started
    row.extra |= peaks(peak - kept, OUTSIDE[row.provider], device) | {"returned_bytes": kept}
    if 3 * took > limits.each:
        row.status, row.reason = "skipped", f"a call takes {took:.1f} s: three rounds would be past {limits.each:g} s"


def judge(row: Row, results: dict[str, Any], reference: Truth, dtype: torch.dtype) -> bool:
    """Whether the results are as exact as they have to be; the row tells how exact."""
    errors = reference.errors(results)
    row.extra |= description(row.case, dtype)
    row.extra |= {"error": max(errors.values(), default=math.inf), "errors": errors}
    row.extra |= {"allowed": {name: reference.allowed[name] for name in errors}, "unchecked": reference.unchecked}
    if why := reference.verdict(errors):
        row.status, row.reason = "wrong", why
    return not why


# Bytes that each provider has taken from the driver, around torch's allocator, and kept. Buffers that a package makes
# once (a symmetric heap, say) are there before the call whose peak is taken, and in every case after the first.
OUTSIDE: Counter[str] = Counter()


def peaks(peak: int, outside: int, device: str) -> dict[str, Any]:
    """peak_bytes of a call and where the figure is from; `outside`: bytes kept around the allocator since before it."""
    source = "process" if kind_of(device) == "cpu" else "allocator and driver" if outside else "allocator"
    return {"peak_bytes": max(0, peak) + outside, "peak_from": source, "outside_bytes": outside}


def description(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    task = TASKS[case.task]
    return {
        "case": str(case),
        "task": case.task,
        "tokens": case.shape.tokens,
        "hidden": case.shape.hidden,
        "vocab": case.shape.vocab,
        "live": case.live,
        "inputs": case.inputs,
        "note": case.note,
        "dtype": str(dtype).removeprefix("torch."),
        "products": task.products,
        "logits_bytes": case.shape.tokens * case.shape.vocab * dtype.itemsize,
    }


def default_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if kind_of(device) == "cuda" else torch.float32


def release(device: str) -> None:
    """Let go of what nobody holds any more. After a failure, once its exception has been dropped."""
    gc.collect()
    if kind_of(device) == "cuda":
        torch.cuda.empty_cache()


def everyone() -> list[Provider]:
    from .peers import PEERS

    return [*OWN, *PEERS]
