"""Time and noise. Providers of a case and its floor take turns: what else the machine does hits them alike.

On CUDA the clock is a pair of events around the call with the stream drained before, and every call gets the next of
some copies of the inputs, which together pass the L2 cache twice. On CPU it is `perf_counter`, and every round has
another copy: where in memory a head happens to lie moves its products by a tenth, run after run alike.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from .inputs import Inputs

COPIES = 2  # on CPU
BUSY = 0.1  # of the processors' time taken by others: every round may be slow alike
LOST = 17  # exit status of a process that ends because of ContextLost
# Of a case: the fewest rounds, the seconds they go on for at least, and those after which three are enough.
ROUNDS, LEAST, MOST = {"cuda": 12, "cpu": 9}, {"cuda": 0.0, "cpu": 3.0}, {"cuda": 12.0, "cpu": 5.0}
# What two runs may differ by in a ratio to the floor is 5 % on CUDA and 15 % on CPU. Each may be off by half of it.
NOISE = {"cuda": 0.025, "cpu": 0.075}
BLOCKS = 6
# 97.5 % of Student's t with so many degrees of freedom lies below.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571)


class TimeUp(BaseException):
    """`limit` ran out. Not an Exception: what is interrupted must not take it for an error of its own and go on."""


class ContextLost(Exception):
    """The CUDA context answers nothing but errors any more (an illegal access, say): only a new process helps."""

    def __init__(self, provider: str, reason: str):
        super().__init__(f"{provider}: {reason}")
        self.provider, self.reason = provider, reason


def kind_of(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"


def seconds(call: Callable[[], object], device: str) -> float:
    if kind_of(device) == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def rotation(inputs: Inputs, device: str) -> list[Inputs]:
    """The inputs and copies of them: on CUDA, between two calls on one, the others have filled the L2 twice."""
    if kind_of(device) == "cpu":
        return [inputs, *(inputs.copy() for _ in range(COPIES))]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [inputs] + [inputs.copy() for _ in range(max(1, -(-2 * cache // inputs.bytes)))]


def take_turns(
    calls: dict[str, Callable[[Inputs], object]],
    inputs: Sequence[Inputs],
    device: str,
    rounds: int | None = None,
    clock: Callable[[Callable[[], Any], str], float] = seconds,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of each call in each round, what the calls that failed said: they have no seconds).

    Turns go forwards and backwards. Raises ContextLost.

    rounds: so many; None: as many as time allows, see ROUNDS.
    clock(call, device): how long the call took.
    """
    kind = kind_of(device)
    fewest, least, most = (rounds, 0.0, math.inf) if rounds else (ROUNDS[kind], LEAST[kind], MOST[kind])
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    given = cycle(inputs)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        for turn in count():
            passed = time.perf_counter() - started
            if (turn >= 3 and passed > most) or (turn >= fewest and passed >= least):
                break
            for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
                now = next(given) if kind == "cuda" else inputs[turn % len(inputs)]
                try:
                    times[name].append(clock(lambda call=calls[name], now=now: call(now), device))
                except Exception as error:
                    check_context(device, name, error)
                    failed[name] = told(error)
                    del times[name]
    finally:
        if enabled:
            gc.enable()
    return times, failed


def hot_seconds(call: Callable[[Inputs], object], inputs: Inputs, device: str, rounds: int = 5) -> float:
    """Median seconds of a call right after the same call on the same inputs: the L2 has what it can have of them."""
    call(inputs)
    return statistics.median(seconds(lambda: call(inputs), device) for _ in range(rounds))


def told(error: BaseException) -> str:
    """An error in the words of a table: its type and the beginning of its message."""
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def check_context(device: str, provider: str, error: Exception) -> None:
    """Raise ContextLost where the error left CUDA unusable."""
    if kind_of(device) == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            raise ContextLost(provider, told(error)) from error


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the body after so many seconds, as soon as Python runs again. In the main thread only."""
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeUp(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ratio(times: Sequence[float], floor: Sequence[float]) -> tuple[float, float]:
    """(median of the rounds' ratios to the floor, how far it may be off, over it).

    That is half of the 95 % interval that the medians of some blocks of consecutive rounds give (the method of batch
    means, with Student's t). Of blocks, since what disturbs a machine lasts seconds: neighbouring rounds are slow
    alike, and their own spread would make a median of many look surer than it is.
    """
    ratios = [t / f for t, f in zip(times, floor)]
    middle, blocks = statistics.median(ratios), min(len(ratios), BLOCKS)
    if blocks < 2:
        return middle, math.inf
    edges = [len(ratios) * i // blocks for i in range(blocks + 1)]
    medians = [statistics.median(ratios[start:end]) for start, end in pairwise(edges)]
    return middle, STUDENT[blocks - 2] * statistics.stdev(medians) / math.sqrt(blocks) / middle


def noise(uncertainty: float, others: float, device: str) -> dict[str, float | bool]:
    """What a row says of its noise; `others`: the share of the processors' time that was not ours."""
    kind = kind_of(device)
    noisy = uncertainty > NOISE[kind] or (kind == "cpu" and others > BUSY)
    return {"uncertainty": uncertainty, "others": others, "noisy": noisy}


class Others:
    """The processors' time that was not for us since this was made: other processes, and what the host of a virtual
    machine gave to others (steal). 0 to 1, and 0 where nobody knows."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = os.times()
        with contextlib.suppress(OSError):
            of_all = Path("/proc/stat").read_text().splitlines()[0]
            user, nice, system, _, _, *interrupts_and_steal = map(int, of_all.split()[1:9])
            busy = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
            return busy, own.user + own.system + own.children_user + own.children_system, own.elapsed
        return 0.0, 0.0, own.elapsed

    def share(self) -> float:
        busy, own, wall = (now - before for now, before in zip(self._now(), self.start))
        return max(0.0, (busy - own) / max(wall, 1e-9) / (os.cpu_count() or 1))


class Replay:
    """A clock for pytest-benchmark that advances by durations measured elsewhere (in turns, by events)."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, duration: float) -> None:
        self.now += duration
