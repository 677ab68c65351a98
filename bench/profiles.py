"""Which kernels take the time of our calls (on a CPU: operators), by torch.profiler.

python -m bench.profiles DEVICE FILE [GROUP]      adds them to the record in FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .cases import TASKS, Case, Shape, cases
from .inputs import make
from .measure import default_dtype
from .providers import OURS
from .record import Record
from .timing import kind_of, told

PROFILED = (("full loss", "srft"), ("scoring", "scoring"))
MOST = 12  # kernels


def profile(group: str, task: str, device: str, only: str = "") -> dict[str, Any]:
    """case, products, kernels (name, calls, milliseconds, share; the largest first) of one call; problem: why none."""
    case = next(case for case in cases(device) if case.task == task)
    if only and only not in group:  # a rehearsal of one group
        case = Case(group, task, Shape(128, 64, 2048))
    found: dict[str, Any] = {"case": str(case), "products": TASKS[task].products, "kernels": []}
    try:
        found["kernels"] = kernels(case, device)
    except Exception as error:  # a profile is worth less than what was measured before it
        found["problem"] = told(error)
    return found


def kernels(case: Case, device: str) -> list[dict[str, Any]]:
    cuda = kind_of(device) == "cuda"
    inputs = make(case, device, default_dtype(device))
    call = OURS.load(device).call(case.task)
    call(inputs)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as recorded:
        call(inputs)
        if cuda:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in recorded.key_averages() if not cuda or str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events) or 1
    return [
        {
            "name": event.key,
            "calls": event.count,
            "milliseconds": getattr(event, attribute) / 1e3,
            "share": getattr(event, attribute) / total,
        }
        for event in events[:MOST]
    ]


def main(device: str, path: str, only: str = "") -> None:
    record = Record(Path(path), resume=True)
    for group, task in PROFILED:
        record.data.setdefault("profiles", []).append(profile(group, task, device, only))
        record.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
