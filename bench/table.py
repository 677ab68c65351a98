"""Rows as text: one block per case, what is not there named below. Used by the terminal and by `make gpu`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .measure import Row

HEADER = f"{'':<36} {'median ms':>10} {'× products':>10} {'TFLOP/s':>8} {'peak MB':>9} {'error':>8}"


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        shown = [row for row in rows if row.case == case and row.status != "unavailable"]
        lines += ["", f"{case}{' · ' + case.note if case.note else ''}", HEADER]
        lines += [line(row) for row in shown]
    absent: dict[tuple[str, str], None] = {(r.provider, r.reason): None for r in rows if r.status == "unavailable"}
    if absent:
        lines += ["", "not measured:", *(f"  {provider:<34} {reason}" for provider, reason in absent)]
    return "\n".join(lines)


def line(row: Row) -> str:
    if row.status != "ok" or not row.seconds:
        return f"  {row.provider:<34} {row.status.upper()}: {row.reason.splitlines()[0] if row.reason else ''}"[:118]
    extra = row.extra

    def number(name: str, form: str, scale: float = 1.0) -> str:
        return format(extra[name] * scale, form) if name in extra else "–"

    milliseconds = statistics.median(row.seconds) * 1e3
    return (
        f"  {row.provider:<34} {milliseconds:>10.2f} {number('ratio_to_products', '.2f'):>10}"
        f" {number('tflops', '.3g'):>8} {number('peak_bytes', '.1f', 1e-6):>9} {number('error', '.1e'):>8}"
        f"{'  noisy' if extra.get('noisy') else ''}"
    )
