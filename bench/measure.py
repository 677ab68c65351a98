"""Measure a case: every provider once for error and memory, then all of them and the floor in turns for time."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import memory, timing
from .cases import TASKS, Case
from .inputs import Inputs, Unavailable, make
from .providers import OURS, Provider, bare_products
from .truth import TOLERANCE, Truth, truth

ROUNDS = {"cuda": 12, "cpu": 7}
MOST = {"cuda": 12.0, "cpu": 6.0}  # seconds of rounds per case
OURS_ALONE = ("srft_kernels", "eager")


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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "case": str(self.case), "group": self.case.group}


def default_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def measure(case: Case, providers: Sequence[Provider], device: str, rounds: int | None = None) -> list[Row]:
    """A row per provider that has to do with the case; those that cannot do the task at all are left out.

    Raises Unavailable where the case's inputs are not there.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    task, dtype = TASKS[case.task], default_dtype(device)
    inputs = make(case, device, dtype)
    reference = truth(inputs, task)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[Inputs], Any]] = {}
    for provider in providers:
        if case.ours and provider.name not in OURS_ALONE:
            continue
        row = Row(case, provider.name, "ok")
        try:
            call = provider.load(device).call(case.task)
            if call is None:
                continue
            examine(row, call, inputs, reference, dtype, device)
        except Unavailable as error:
            row.status, row.reason = "unavailable", str(error)
        except Exception as error:  # a peer may fail in any way; it is told, and the others go on
            row.status, row.reason = "failed", f"{type(error).__name__}: {str(error).strip()[:300]}"
        rows[provider.name] = row
        if row.status == "ok":
            calls[provider.name] = call
        release(device)
    del reference
    timed = {"bare products": bare_products(inputs, task), **calls}
    timed["bare products"](inputs)
    copies = timing.rotation(inputs, device)
    others = timing.Others()
    times = timing.take_turns(timed, copies, device, rounds or ROUNDS[kind], MOST[kind])
    floor = times.pop("bare products")
    busy = others.share()
    for name, measured in times.items():
        middle, spread = timing.ratio(measured, floor)
        rows[name].seconds = measured
        rows[name].extra |= {
            "ratio_to_products": middle,
            "spread": spread,
            "others": busy,
            "noisy": spread > timing.NOISE[kind] or (kind == "cpu" and busy > timing.BUSY),
            "tflops": case.flops / statistics.median(measured) / 1e12,
            "products_seconds": statistics.median(floor),
        }
    release(device)
    return list(rows.values())


def examine(
    row: Row, call: Callable[[Inputs], Any], inputs: Inputs, reference: Truth, dtype: torch.dtype, device: str
) -> None:
    """Error against fp64, and the peak of a second call, above inputs and returned gradients."""
    results = call(inputs)  # compiles, tunes, warms up
    errors = reference.errors(results)
    worst, tolerance = max(errors.values(), default=float("inf")), TOLERANCE[dtype]
    kept = sum(t.numel() * t.element_size() for name in ("dx", "dW") if (t := results.get(name)) is not None)
    row.extra |= description(row.case, dtype) | {"error": worst, "errors": errors, "tolerance": tolerance}
    if not worst <= tolerance:
        where = ", ".join(f"{name} {error:.2g}" for name, error in errors.items() if not error <= tolerance)
        row.status, row.reason = "wrong", f"error {where or 'unknown: no result'} (allowed {tolerance:g})"
        return
    del results
    release(device)
    held: list[Any] = []
    peak = memory.peak_bytes(lambda: held.append(call(inputs)), device)
    row.extra |= {"peak_bytes": max(0, peak - kept), "returned_bytes": kept}


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


def release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def everyone() -> list[Provider]:
    from .peers import PEERS

    return [OURS, *PEERS]
