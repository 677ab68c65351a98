"""Whether two runs on one machine agree: rows whose ratio to the products differs by more than 5 % (GPU) or 15 % (CPU).

    python -m bench.agreement A.json B.json

A row that either run calls noisy has made no promise. Exit status 1 where rows disagree, or there is none to compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MOST = {"cuda": 0.05, "cpu": 0.15}


def disagreements(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], int]:
    """(a line for each row on which two runs disagree, how many rows both have a ratio for and neither calls noisy)."""
    kinds = {run["machine_info"]["kind"] for run in (a, b)}
    if len(kinds) > 1:
        raise ValueError("one run is from a GPU and one from a CPU: expected two runs on the same machine")
    most = MOST[kinds.pop()]
    first, second = (ratios(run) for run in (a, b))
    lines = [
        f"{second[key] / first[key] - 1:+6.0%}  {first[key]:.2f} → {second[key]:.2f} × products  {', '.join(key)}"
        for key in first
        if key in second and abs(second[key] / first[key] - 1) > most
    ]
    return lines, len(first.keys() & second.keys())


def ratios(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Of the rows that are not noisy, by case and provider."""
    rows = [row["extra_info"] for row in run["benchmarks"]]
    return {(row["case"], row["provider"]): row["ratio_to_products"] for row in rows
            if row.get("ratio_to_products") and not row.get("noisy")}  # fmt: skip


def main(paths: list[str]) -> int:
    if len(paths) != 2:
        print("bench.agreement: expected two files, python -m bench.agreement A.json B.json", file=sys.stderr)
        return 2
    lines, compared = disagreements(*(json.loads(Path(path).read_text(encoding="utf-8")) for path in paths))
    print(*lines, f"{compared} rows compared, {len(lines)} disagree", sep="\n")
    return 1 if lines or not compared else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
