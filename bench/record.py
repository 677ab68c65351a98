"""The JSON of a run, written whole after every case: however the run ends, what was measured by then is there.

    machine_info, commit_info    see environment.py
    benchmarks                   rows with times, as pytest-benchmark writes them
    untimed                      the others: case, group, provider, status, reason, error
    started, seconds             Unix time; how long the run took, or has taken so far
    left_out                     {provider: why}: took a process down, and is not tried again

`make gpu` adds tests and profiles (gpu.py). No number in it is infinite or NaN: null.

Beside it, FILE.running names the case and provider at work; what a dead process leaves there is what it died of.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_benchmark.stats import Stats

from .cases import Case
from .measure import EVERYONE, Row
from .providers import OURS


class Record:
    """The file at `path`, continued where it is there and `resume`."""

    def __init__(self, path: Path, resume: bool = False):
        self.path, self.mark = path, path.with_suffix(".running")
        self.data: dict[str, Any] = {"started": time.time(), "benchmarks": [], "untimed": []}
        if not resume:
            self.mark.unlink(missing_ok=True)
        elif path.exists():
            self.read()

    def read(self) -> None:
        self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, **changes: Any) -> None:
        self.data |= changes | {"seconds": round(time.time() - self.data["started"], 1)}
        replace(self.path, json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n")

    def begin(self, case: Case, provider: str) -> None:
        at = {"case": str(case), "group": case.group, "provider": provider, "since": time.time()}
        replace(self.mark, json.dumps(at))

    def add(self, rows: Iterable[Row]) -> None:
        """What a case came to; nothing is running any more."""
        rows = list(rows)
        self.data["benchmarks"] += [timed(row) for row in rows if row.status == "ok"]
        self.data["untimed"] += [untimed(row) for row in rows if row.status != "ok"]
        self.write()
        self.mark.unlink(missing_ok=True)

    @property
    def running(self) -> dict[str, Any] | None:
        """case, group, provider, since (Unix time)."""
        try:
            return json.loads(self.mark.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def blame(self, reason: str, skipped: bool = False) -> str:
        """Note who was running when the process ended, so that the next one does not end the same way. Returns who.

        A peer is left out from here on; ours, and what concerns every provider, only fails this case.
        skipped: nobody is to blame, there was no time.
        """
        running = self.running
        who = running["provider"]
        if skipped or who.startswith(EVERYONE) or who == OURS.name:
            lost = {key: running[key] for key in ("case", "group")} | {"provider": EVERYONE, "error": None}
            lost |= (
                {"status": "skipped", "reason": reason}
                if skipped
                else {"status": "failed", "reason": f"{who}: {reason}"}
            )
            self.data["untimed"].append(lost)
        else:
            self.data["left_out"] = self.left_out | {who: f"{reason}, in {running['case']}"}
        self.write()
        self.mark.unlink()
        return who

    @property
    def left_out(self) -> dict[str, str]:
        return self.data.get("left_out", {})

    @property
    def done(self) -> set[str]:
        """The cases that need no further look."""
        return {row["extra_info"]["case"] for row in self.data["benchmarks"]} | {
            row["case"] for row in self.data["untimed"]
        }


def replace(path: Path, text: str) -> None:
    """The whole file at once: whoever reads it, or kills this process, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def timed(row: Row) -> dict[str, Any]:
    stats = Stats()
    for duration in row.seconds:
        stats.update(duration)
    return {
        "group": row.case.group,
        "name": f"{row.case}-{row.provider}",
        "extra_info": {"provider": row.provider, **row.extra},
        "stats": stats.as_dict() | {"data": row.seconds},
    }


def untimed(row: Row) -> dict[str, Any]:
    """What pytest-benchmark knows nothing of: a row without a time, and why."""
    return {
        "case": str(row.case),
        "group": row.case.group,
        "provider": row.provider,
        "status": row.status,
        "reason": row.reason,
        "error": row.extra.get("error"),
    }


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
