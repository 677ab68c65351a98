"""Rows as text: one block per case, what is not there named below. Used by the terminal and by `make gpu`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from .cases import TASKS
from .measure import Row

HEADER = f"{'':<36} {'median ms':>10} {'× products':>12} {'TFLOP/s':>8} {'peak MB':>9} {'error':>8} {'dW others':>9}"
KEPT = 3  # products of a task that takes two passes, for who keeps the logits between them


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        shown = [row for row in rows if row.case == case and row.status != "unavailable"]
        unchecked = next((row.extra["unchecked"] for row in shown if row.extra.get("unchecked")), "")
        lines += ["", " · ".join(filter(None, (str(case), case.note, unchecked))), HEADER]
        lines += [line(row) for row in shown]
    absent: dict[tuple[str, str], None] = {(r.provider, r.reason): None for r in rows if r.status == "unavailable"}
    if absent:
        lines += ["", "not measured:", *(f"  {provider:<34} {reason}" for provider, reason in absent)]
    return "\n".join(lines)


def line(row: Row) -> str:
    if row.status != "ok" or not row.seconds:
        return f"  {row.provider:<34} {row.status.upper()}: {row.reason.splitlines()[0] if row.reason else ''}"[:160]
    extra = row.extra

    def number(name: str, form: str, scale: float = 1.0) -> str:
        return format(extra[name] * scale, form) if extra.get(name) is not None else "–"

    milliseconds = statistics.median(row.seconds) * 1e3
    others = extra.get("errors", {}).get("dW others")
    notes = ["noisy"] * bool(extra.get("noisy"))
    if TASKS[row.case.task].products > KEPT and "ratio_to_products" in extra:
        notes.append(of_kept(extra["ratio_to_products"], TASKS[row.case.task].products))
    if extra.get("hot_seconds"):
        notes.append(f"hot L2 {extra['hot_seconds'] * 1e3:.2f} ms")
    return (
        f"  {row.provider:<34} {milliseconds:>10.2f} {number('ratio_to_products', '.2f') + off(extra):>12}"
        f" {number('tflops', '.3g'):>8} {number('peak_bytes', '.1f', 1e-6):>9} {number('error', '.1e'):>8}"
        f" {'–' if others is None else format(others, '.1e'):>9}{''.join('  ' + note for note in notes)}"
    )


def off(row: dict[str, Any]) -> str:
    """How far a ratio may be off; nothing where nobody knows."""
    return f" ±{row['uncertainty']:.0%}" if math.isfinite(row.get("uncertainty") or math.inf) else ""


def of_kept(ratio: float, products: int) -> str:
    """The ratio to the products of a plan as one to those of a plan that keeps the logits: all cost the same."""
    return f"{ratio * products / KEPT:.2f} × the {KEPT} products of who keeps the logits"
