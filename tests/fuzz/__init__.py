"""Random small calls of the loss head against fp64, for as long as you like.

    python -m tests.fuzz --minutes 5 [--seed N]       cases N, N + 1, … (N: by the clock); exit status 1 at a failure
    python -m tests.fuzz --seed N --cases 1           case N again
    python -m tests.fuzz --workers K                  K processes, each with cases of its own
    python -m tests.fuzz --backend triton             the same cases on the Triton kernels, in Triton's interpreter

A case is one call with all its gradients, drawn from its number alone: function, shapes, types, options, plan, and rows
that are random, peaked, flat, tied, huge, partly −inf (tests/srft_kernels/cases.py). Uninitialised memory is NaN.

The rule is the tests': an error against fp64 of at most twice eager PyTorch's, and a few roundings. On a handful of
numbers eager may be right by luck, so the roundings are of the largest terms that were summed, not of what their sum
left over; and where the rule is broken eager gets more chances, the same problem with its vocabulary in other orders
and, against the Triton kernels, with a tanh that is off by an ulp here and there, as a GPU's (2 ulp, says the CUDA C++
Programming Guide of tanhf).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..interpreter import interpret_fast
from ..srft_kernels import cases
from .draw import OBJECTIVES, Case, Values, draw
from .full import full, logits
from .fused import fused

__all__ = ["OBJECTIVES", "draw", "failure", "fused", "logits", "main", "poison"]

ORDERS = 12


def failure(case: Case, run: Callable[[Case], Values] = fused) -> str | None:
    """What is wrong with the case; None: nothing."""
    found = run(case)
    if not case.problem.live.any():  # where PyTorch has NaN
        wrong = [name for name, value in found.items() if (value != 0).any()]
        return f"{wrong} of no live token are not 0" if wrong else None
    terms: Values = {}
    truth = full(case, torch.float64, torch.float64, terms=terms)
    eager = full(case, None, torch.float32)
    errors = {**_errors(eager, truth), **_without_luck(eager, truth, terms)}
    if not (broken := _broken(found, truth, errors, terms)):
        return None
    generator = torch.Generator().manual_seed(case.seed)
    size = case.problem.head.get("vocab_size", len(case.problem.weight))
    for turn in range(ORDERS):
        order, tanh = torch.randperm(size, generator=generator), torch.tanh
        if turn % 2 and case.plan is not None and case.plan.backend == "triton":
            tanh = partial(_off_by_ulps, generator=generator)
        eager = full(case, None, torch.float32, order, tanh=tanh)
        more = {**_errors(eager, truth), **_without_luck(eager, truth, terms)}
        errors = {name: max(error, more[name]) for name, error in errors.items()}
        if not (broken := _broken(found, truth, errors, terms)):
            return None
    return broken


def _off_by_ulps(x: Tensor, generator: torch.Generator) -> Tensor:
    """tanh x, a third of it one ulp more and a third one less, and never above 1."""
    tanh, step = x.tanh(), torch.randint(-1, 2, x.shape, generator=generator)
    with torch.no_grad():
        moved = torch.where(step == 0, tanh, torch.nextafter(tanh, step.to(tanh.dtype)))
    return tanh + (moved - tanh)


def _errors(values: Values, truth: Values) -> dict[str, float]:
    return {name: float(cases.error(values[name], truth[name])) for name in truth}


def _without_luck(eager: Values, truth: Values, terms: Values) -> dict[str, float]:
    """What eager's loss would be off by if the errors of its tokens added up: on a handful they may cancel."""
    if "logprobs" not in truth or "slopes" not in terms:
        return {}
    names = ("logprobs", "entropy", "logsumexp")
    sizes = [slope * (eager[name] - truth[name]).abs() for slope, name in zip(terms["slopes"], names)]
    added = float(torch.stack(sizes).nan_to_num(0, 0, 0).sum())
    return {"loss": max(added, float(cases.error(eager["loss"], truth["loss"])))}


def _broken(found: Values, truth: Values, eager: dict[str, float], terms: Values) -> str | None:
    for name, error in _errors(found, truth).items():
        finite = truth[name][truth[name].isfinite()]
        magnitude = max(float(finite.abs().amax()) if finite.numel() else 0.0, float(terms.get(name, 0.0)))
        allowed = 2 * eager[name] + cases.ULPS * torch.finfo(found[name].dtype).eps * magnitude
        if not error <= allowed:
            return f"{name} is off by {error:.3g}, allowed {allowed:.3g} (eager {eager[name]:.3g}, of {magnitude:.3g})"
    return None


def poison() -> None:
    """Uninitialised memory is NaN from here on."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) * 1000, help="number of the first case")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--backend", choices=["torch", "triton"], default="torch", help="row operations")
    arguments = parser.parse_args()
    if arguments.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":  # to be set before its import
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])
    if arguments.workers > 1:
        share = arguments.cases and -(-arguments.cases // arguments.workers)
        command = [sys.executable, "-m", "tests.fuzz", "--backend", arguments.backend]
        command += ["--minutes", str(arguments.minutes)]
        command += ["--cases", str(share)] if share else []
        starts = [arguments.seed + i * (share or 10**8) for i in range(arguments.workers)]
        return max([process.wait() for process in [subprocess.Popen([*command, "--seed", str(n)]) for n in starts]])
    torch.set_num_threads(1)
    poison()
    interpret_fast()
    print(f"seed {arguments.seed}", flush=True)
    start = told = time.monotonic()
    done = 0
    while (elapsed := time.monotonic() - start) < 60 * arguments.minutes and done != arguments.cases:
        case = draw(arguments.seed + done, backend=arguments.backend)
        if message := failure(case):
            again = f"python -m tests.fuzz --backend {arguments.backend} --seed {case.seed} --cases 1"
            print(f"FAILED: {message}\n  {case}\n  {again}")
            return 1
        done += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{done} cases, {done / elapsed:.0f}/s", flush=True)
    print(f"{done} cases passed in {elapsed:.0f} s, {done / max(elapsed, 1e-9):.0f}/s")
    return 0
