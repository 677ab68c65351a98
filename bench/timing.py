"""Time and noise. Providers of a case and its floor take turns: what else the machine does hits them alike.

On CUDA the clock is a pair of events around the call with the stream drained before, on CPU `perf_counter`. Inputs
rotate among copies that together pass the L2 cache twice.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .inputs import Inputs

BUSY = 0.1  # of the processors' time in other processes: every round may be slow alike
NOISE = {"cuda": 0.05, "cpu": 0.15}  # what two runs may differ by in a ratio to the floor


def seconds(call: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
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
    """Copies that no cache holds together; one where a single input is already past the L2, or on a CPU."""
    if not device.startswith("cuda"):
        return [inputs]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [inputs] + [inputs.copy() for _ in range(-(-2 * cache // inputs.bytes))]


def take_turns(
    calls: dict[str, Callable[[Inputs], object]], inputs: Sequence[Inputs], device: str, rounds: int, most: float
) -> dict[str, list[float]]:
    """Seconds of each call in each round, forwards and backwards in turn; fewer rounds (3 at least) past `most` s."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        for turn in range(rounds):
            if turn >= 3 and time.perf_counter() - started > most:
                break
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                given = inputs[turn % len(inputs)]
                times[name].append(seconds(lambda call=calls[name], given=given: call(given), device))
    finally:
        if enabled:
            gc.enable()
    return times


def ratio(times: Sequence[float], floor: Sequence[float]) -> tuple[float, float]:
    """(median of the rounds' ratios to the floor, their interquartile range over it)."""
    ratios = [t / f for t, f in zip(times, floor)]
    middle = statistics.median(ratios)
    if len(ratios) < 2:
        return middle, float("inf")
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / middle


class Others:
    """How much of the processors' time other processes took since this was made: 0 to 1, and 0 where nobody knows."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = os.times()
        with contextlib.suppress(OSError):
            of_all = Path("/proc/stat").read_text().splitlines()[0]
            user, nice, system, _, _, *interrupts = map(int, of_all.split()[1:8])
            busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
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
