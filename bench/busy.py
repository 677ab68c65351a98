"""A call beside programs that keep every processor busy, and what it takes where threads wait less long for work.

GNU OpenMP's threads spin for work they may get, some milliseconds. Beside other programs the thread that they wait for
may not be running: each parallel region then costs a turn of the scheduler's. `srft` sets GOMP_SPINCOUNT, which has to
be in the environment before torch is loaded; so each is measured in a process of its own, in turns with the products.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator

import torch

from srft import SPINS

from . import timing
from .cases import TASKS, Case, Shape
from .inputs import Unavailable, make
from .measure import EVERYONE, Limits, Row, attempt, default_dtype, description, set_times, stage
from .providers import OURS, SHORT_WAITS, bare_products
from .timing import kind_of

SHAPE = Shape(256, 576, 49152)
NAMES = {OURS.name: {}, SHORT_WAITS: {"GOMP_SPINCOUNT": str(SPINS)}}
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
FLOOR, PATIENCE, ROUNDS = "bare products", 90.0, 5


def busy_case(device: str) -> Case:
    note = f"beside a busy program per processor; {SHORT_WAITS}: GOMP_SPINCOUNT={SPINS}"
    return Case("beside busy programs", "srft", SHAPE, "peaked", ours=True, note=note)


def measure_busy(
    device: str,
    rounds: int | None = None,
    limits: Limits | None = None,
    begin: Callable[[str], None] = lambda provider: None,
    left_out: Collection[str] = (),
) -> list[Row]:
    """A row for each way to wait, as `measure.measure`: errors are those of the same case without other programs."""
    case = busy_case(device)
    limits = Limits(limits.deadline if limits else math.inf, PATIENCE)  # of a process that others slow down
    if kind_of(device) != "cpu":
        raise Unavailable("a GPU is not shared with other programs here")
    rows = []
    with others(len(os.sched_getaffinity(0))):
        for name, environment in NAMES.items():
            if name in left_out:
                continue
            row = Row(case, name, "ok", extra=description(case, default_dtype(device)))
            rows.append(row)
            begin(name)
            with attempt(row, device, limits):
                limits.check(name)
                with stage("a process of its own", device):
                    seconds = in_its_own_process(environment, rounds)
                set_times(row, seconds[OURS.name], seconds[FLOOR], 0.0, device)
    begin(EVERYONE)
    return rows


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """So many programs that do nothing but run."""
    spin = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def in_its_own_process(environment: dict[str, str], rounds: int | None) -> dict[str, list[float]]:
    """Seconds of our call and of the products."""
    usual = {name: value for name, value in os.environ.items() if name not in WAITS}
    command = [sys.executable, "-m", "bench.busy", json.dumps([*vars(SHAPE).values(), torch.get_num_threads(), rounds])]
    run = subprocess.run(command, env=usual | environment, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return json.loads(run.stdout)


def main() -> None:
    tokens, hidden, vocab, threads, rounds = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = Case("beside busy programs", "srft", Shape(tokens, hidden, vocab), "peaked")
    inputs = make(case, "cpu", default_dtype("cpu"))
    calls = {OURS.name: OURS.load("cpu").call(case.task), FLOOR: bare_products(inputs, TASKS[case.task])}
    for call in calls.values():
        call(inputs)
    times, failed = timing.take_turns(calls, [inputs], "cpu", rounds or ROUNDS)
    print(json.dumps(times) if not failed else sys.exit(str(failed)))


if __name__ == "__main__":
    main()
