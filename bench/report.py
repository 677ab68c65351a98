"""`python -m bench.report`: bench/results/*.json → docs/performance.md, with figures under docs/figures/.

Everything on that page comes from those files. What none of them has from a GPU is said to be not measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .environment import ROOT

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
GROUPS = (
    "full loss",
    "scoring",
    "two pass",
    "frozen head",
    "masked batches",
    "cost against N",
    "cost against V",
    "peak memory",
    "1 M tokens",
    "training step",
)
INTRO = """# Performance

Made by `python -m bench.report` from `bench/results/*.json`; not written by hand.

- **× products**: time over the task's bare matrix products (2NHV flops each) of the same shape and type, timed in the
  same run, in turns with it. 1.00 is what the hardware allows: nothing but the products. Median of the rounds' ratios.
- **TFLOP/s** counts those products on live tokens only, over the median time.
- **peak**: the most memory held during the call above inputs and returned gradients (CUDA: the allocator's peak; CPU:
  the process's).
- **error**: the largest ‖out − truth‖ / ‖truth‖ of loss, log-probs, entropies and gradients on sampled rows, truth in
  fp64. Past the tolerance a provider is WRONG and has no time.
- *noisy*: the rounds' ratios spread over more than 5 % (GPU) or 15 % (CPU) between quartiles, or other processes took
  more than a tenth of the CPU meanwhile: read no more into it.
- Inputs: *random* rows are nearly flat; *peaked* ones have the 0.1–0.5 nats of a policy in training; *model* ones are
  hidden states and head of SmolLM2-135M.
"""


class Result:
    """One JSON file: rows by case, and what it was measured on."""

    def __init__(self, path: Path):
        data = json.loads(path.read_text(encoding="utf-8"))
        self.name, self.machine = path.stem, data["machine_info"]
        self.profiles, self.tests = data.get("profiles", []), data.get("tests", {})
        self.cases: dict[str, dict[str, list]] = {}  # group → case → rows
        for row in data["benchmarks"]:
            extra = row["extra_info"] | {"median": row["stats"]["median"], "status": "ok"}
            self.cases.setdefault(row["group"], {}).setdefault(extra["case"], []).append(extra)
        self.absent: dict[tuple[str, str], None] = {}
        self.skipped: list[str] = []
        for row in data.get("untimed", []):
            if row["status"] == "unavailable":
                self.absent[row["provider"], row["reason"]] = None
            elif row["status"] == "skipped":
                self.skipped.append(f"{row['case']} ({row['reason']})")
            else:
                self.cases.setdefault(row["group"], {}).setdefault(row["case"], []).append(row)

    @property
    def title(self) -> str:
        return str(self.machine.get("device", self.name))

    @property
    def source(self) -> str:
        """What every table and figure has to name."""
        m = self.machine
        packages = ", ".join(f"{name} {version}" for name, version in m.get("packages", {}).items())
        driver = "" if m.get("driver", "none") == "none" else f", driver {m['driver']}, CUDA {m.get('cuda')}"
        versions = f"Python {m.get('python')}, {packages}; commit {m.get('commit')}"
        return f"{self.title}{driver}; {versions}; `{m.get('command')}`"

    def points(self, group: str, x: str, y: str, scale: float = 1.0) -> dict[str, list[tuple[float, float]]]:
        """(x, y) by provider of the rows of a group that have both."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for rows in self.cases.get(group, {}).values():
            for row in rows:
                if x in row and y in row:
                    lines.setdefault(row["provider"], []).append((row[x], row[y] * scale))
        return {name: sorted(points) for name, points in lines.items()}


def main(results: Path = RESULTS, docs: Path = DOCS) -> int:
    found = [Result(path) for path in sorted(results.glob("*.json"))]
    found.sort(key=lambda result: result.machine.get("kind") != "cuda")
    parts = [INTRO]
    if not any(result.machine.get("kind") == "cuda" for result in found):
        missing = "; ".join(GROUPS)
        parts.append(f"## GPU\n\nNot measured: {missing}. `make gpu` on a machine with one fills this in.\n")
    parts += [section(result, docs) for result in found]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "performance.md").write_text("\n".join(parts), encoding="utf-8")
    print(docs / "performance.md")
    return 0


def section(result: Result, docs: Path) -> str:
    lines = [f"## {result.title}", "", f"{result.source}.", ""]
    for name, words in result.tests.items():
        lines += [f"Tests on it: `{name}`: {words['summary']}.", ""]
    for group in GROUPS:
        lines += [f"### {group[0].upper()}{group[1:]}", ""]
        if group not in result.cases:
            lines += ["Not measured.", ""]
        for case, rows in result.cases.get(group, {}).items():
            lines += table(case, rows)
        if path := figure(result, group, docs):
            lines += [f"![{group} on {result.title}]({path})", "", f"*{result.source}.*", ""]
    for profile in result.profiles:
        lines += kernels(profile)
    if result.absent or result.skipped:
        lines += ["### Not measured here", ""]
        lines += [f"- {who}: {why}" for who, why in result.absent] + [
            f"- {case}" for case in dict.fromkeys(result.skipped)
        ]
        lines.append("")
    return "\n".join(lines)


def table(case: str, rows: list[dict[str, Any]]) -> list[str]:
    note = next((row["note"] for row in rows if row.get("note")), "")
    lines = [f"**{case.partition(': ')[2]}**" + (f" ({note})" if note else ""), ""]
    lines += ["| | median | × products | TFLOP/s | peak | error | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['provider']} | {row['status'].upper()} | | | | | {row['reason'].splitlines()[0]} |")
            continue
        cells = [
            row["provider"],
            f"{row['median'] * 1e3:,.1f} ms",
            number(row, "ratio_to_products", "{:.2f}"),
            number(row, "tflops", "{:.3g}"),
            number(row, "peak_bytes", "{:,.1f} MB", 1e-6),
            number(row, "error", "{:.0e}"),
            "noisy" if row.get("noisy") else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def number(row: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    return "–" if row.get(name) is None else form.format(row[name] * scale)


def kernels(profile: dict[str, Any]) -> list[str]:
    lines = [f"### Profile of srft_kernels, {profile['case']}", ""]
    if "problem" in profile:
        return [*lines, f"Not measured: {profile['problem']}", ""]
    lines += ["| ms | share | calls | kernel |", "|---|---|---|---|"]
    for k in profile["kernels"]:
        name = k["name"].replace("|", "/")[:100]
        lines.append(f"| {k['milliseconds']:.2f} | {k['share']:.0%} | {k['calls']} | `{name}` |")
    return [*lines, ""]


def figure(result: Result, group: str, docs: Path) -> str | None:
    """An SVG for the groups that are about a curve; its path from the page, or None."""
    drawn = {
        "full loss": bars,
        "cost against N": lambda r, ax: curve(r, ax, group, "tokens", "ratio_to_products", "× products", "tokens N"),
        "cost against V": lambda r, ax: curve(r, ax, group, "vocab", "ratio_to_products", "× products", "vocabulary V"),
        "peak memory": lambda r, ax: curve(r, ax, group, "tokens", "peak_bytes", "peak, MB", "tokens N", 1e-6, True),
        "masked batches": lambda r, ax: curve(
            r, ax, group, "live", "median", "time, ms", "live part of the tokens", 1e3
        ),
    }.get(group)
    if drawn is None or group not in result.cases:
        return None
    try:
        import matplotlib
    except ImportError:
        sys.exit("bench.report draws with matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "srft-kernels", "svg.fonttype": "none"}  # the same figure, the same file
    name = f"{result.name}-{re.sub('[^a-z0-9]+', '-', group.lower())}.svg"
    figure, ax = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    drawn(result, ax)
    ax.set_title(f"{group}, {result.title}", fontsize=10)
    m = result.machine
    named = (
        f"driver {m.get('driver')}; torch {m.get('packages', {}).get('torch')}; {m.get('commit')}; {m.get('command')}"
    )
    ax.annotate(named, (0, 0), (0, -42), xycoords="axes fraction", textcoords="offset points", fontsize=6, color="0.4")
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "figures" / name, metadata={"Date": None})
    pyplot.close(figure)
    return f"figures/{name}"


def bars(result: Result, ax: Any) -> None:
    """Time against the floor: a bar per provider and case."""
    rows = [row for rows in result.cases["full loss"].values() for row in rows if row.get("ratio_to_products")]
    names = [f"{row['provider']}, {row['case'].partition(': ')[2]}" for row in rows]
    colours = ["tab:blue" if row["provider"] == "srft_kernels" else "0.7" for row in rows]
    ax.figure.set_figheight(0.9 + 0.24 * len(rows))
    ax.barh(names, [row["ratio_to_products"] for row in rows], color=colours)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("time / bare matrix products (1 is the floor)")


def curve(
    result: Result, ax: Any, group: str, x: str, y: str, y_label: str, x_label: str, scale: float = 1, log: bool = False
) -> None:
    for name, points in result.points(group, x, y, scale).items():
        ax.plot(*zip(*points), marker="o", label=name)
    if x != "live":
        ax.set_xscale("log", base=2)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
