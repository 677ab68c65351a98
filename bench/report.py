"""bench/results/*.json → docs/performance.md, with figures under docs/figures/.

    python -m bench.report              what is in bench/results/, where `make gpu` on a GPU leaves its JSON
    python -m bench.report FILE...      these too: .benchmarks/latest.json is where `make bench` leaves its own

Everything on that page comes from those files. What none of them has from a GPU is said to be not measured.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import targets
from .environment import ROOT
from .providers import OUR_NAMES
from .table import KEPT, of_kept, off

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
GROUPS = (
    "full loss",
    "scoring",
    "two pass",
    "frozen head",
    "filtered backward",
    "compiled",
    "small calls",
    "masked batches",
    "cost against N",
    "cost against V",
    "peak memory",
    "1 M tokens",
    "training step",
    "packed rows",
    "beside busy programs",
    "sharded",
)
INTRO = """# Performance

Made by `python -m bench.report` from `bench/results/*.json`; not written by hand.

- `make gpu` on a GPU, or `make bench` anywhere, leaves a JSON; `python -m bench.report` makes this page of those in
  `bench/results/`, and of any others that it is given: `python -m bench.report .benchmarks/latest.json`.
- **× products**: time over the task's bare matrix products (2NHV flops each) of the same shape and type, timed in the
  same run, in turns with it. 1.00 is what the hardware allows: nothing but the products. Median of the rounds' ratios.
  They are the products of a plan that does not keep the logits: 1 scores, 3 make a loss with both gradients in one
  pass, 4 in two. Eager PyTorch keeps the logits and needs 3 for the latter: that ratio stands beside.
- **TFLOP/s** counts those products on live tokens only, over the median time.
- **peak**: the most memory held during the call above inputs and returned gradients (CUDA: the allocator's peak; CPU:
  the process's).
- **error**: the largest ‖out − truth‖ / ‖truth‖ of loss, log-probs, entropies and gradients on sampled rows, truth in
  fp64. **dW others**: that of the head's gradient on entries that are nobody's target, small numbers which those of
  targets would hide.
- WRONG, and so without a time, is who errs more than three times as much as eager PyTorch does in the same type on the
  same inputs (and more than by one rounding of the result), whose gradient is 2 % too long or too short, or who gives
  an ignored token a gradient.
- **±** is half of the 95 % interval of that ratio, from the medians of up to six blocks of consecutive rounds, between
  which a machine's slow spells do not hide. *noisy*: it is more than 2.5 % (GPU) or 7.5 % (CPU), or other processes
  took more than a tenth of the CPU meanwhile: read no more into it. On all other rows two runs on one machine should
  agree within 5 % and 15 %, which `python -m bench.agreement` tells.
- Inputs: *random* rows are nearly flat; *peaked* ones have the 0.1–0.5 nats of a policy in training; *model* ones are
  hidden states and head of SmolLM2-135M.
"""


class Result:
    """One JSON file: rows by case, and what it was measured on."""

    def __init__(self, path: Path):
        data = load(path)
        self.name, self.machine = path.stem, data["machine_info"]
        self.profiles, self.tests = data.get("profiles", []), data.get("tests", {})
        self.partial = bool(data.get("partial"))
        self.seconds = data.get("total_seconds") or data.get("seconds")
        self.problems = data.get("problems", []) + [f"{who}: {why}" for who, why in data.get("left_out", {}).items()]
        self.targets = targets.evaluate(data)
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
                who = "" if row["provider"] == "all providers" else f"{row['provider']}, "
                self.skipped.append(f"{who}{row['case']} ({one_line(row['reason'])})")
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
        table = f"; launch table: {m['launch_table']}" if "launch_table" in m else ""
        return f"{self.title}{driver}; {versions}{table}; `{m.get('command')}`"

    def points(self, group: str, x: str, y: str, scale: float = 1.0) -> dict[str, list[tuple[float, float]]]:
        """(x, y) by provider of the rows of a group that have both."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for rows in self.cases.get(group, {}).values():
            for row in rows:
                if row.get(x) is not None and row.get(y) is not None:
                    lines.setdefault(row["provider"], []).append((row[x], row[y] * scale))
        return {name: sorted(points) for name, points in lines.items()}


def load(path: Path) -> dict[str, Any]:
    """A run's JSON. Exit status 2, and one line, where there is none."""
    try:
        # Infinity and NaN are not JSON, and Python writes them all the same
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        if data["machine_info"] and all("case" in row["extra_info"] for row in data["benchmarks"]):
            return data
        why = "no JSON of a run of the bench"
    except OSError as error:
        why = error.strerror
    except (ValueError, LookupError, TypeError):
        why = "no JSON of a run of the bench"
    print(f"bench.report: {path}: {why}; give it what `make gpu` or `make bench` left", file=sys.stderr)
    sys.exit(2)


def main(files: Sequence[Path] = (), results: Path = RESULTS, docs: Path = DOCS) -> int:
    paths = dict.fromkeys(path.resolve() for path in (*sorted(results.glob("*.json")), *files))
    found = [Result(path) for path in paths]
    if len({result.name for result in found}) < len(found):
        sys.exit("bench.report: figures are named after their files, so two files may not have one name")
    found.sort(key=lambda result: result.machine.get("kind") != "cuda")
    parts = [INTRO]
    if not any(result.machine.get("kind") == "cuda" for result in found):
        missing = "; ".join(GROUPS)
        parts.append(f"## GPU\n\nNot measured: {missing}. `make gpu` on a machine with one fills this in.\n")
        parts += ["\n".join(verdicts(targets.evaluate({"benchmarks": []})))]
    parts += [section(result, docs) for result in found]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "performance.md").write_text("\n".join(parts), encoding="utf-8")
    print(docs / "performance.md")
    return 0


def section(result: Result, docs: Path) -> str:
    lines = [f"## {result.title}", "", f"{result.source}." + took(result.seconds), ""]
    if result.partial:
        lines += ["**Partial**: the run ended before all of it was measured.", ""]
    lines += [f"- {one_line(problem)}" for problem in result.problems] + [""] * bool(result.problems)
    for name, words in result.tests.items():
        lines += [f"Tests on it: `{name}`: {words['summary']}.", ""]
    if result.machine.get("kind") == "cuda":
        lines += verdicts(result.targets)
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


def verdicts(found: list[tuple[str, str, str, str]]) -> list[str]:
    """targets.py: what is to be reached, and whether it was."""
    lines = [
        "### Targets",
        "",
        "For an H200, in bf16; medians of one run.",
        "",
        "| | goal | found | |",
        "|---|---|---|---|",
    ]
    return [*lines, *(f"| {' | '.join(map(one_line, row))} |" for row in found), ""]


def took(seconds: float | None) -> str:
    return "" if not seconds else f" Everything took {int(seconds // 60)} min {seconds % 60:.0f} s."


def one_line(text: str, most: int = 300) -> str:
    """Text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:most]


COLUMNS = ("median", "× products", "TFLOP/s", "peak", "error", "dW others")


def table(case: str, rows: list[dict[str, Any]]) -> list[str]:
    notes = dict.fromkeys(row[key] for row in rows for key in ("note", "unchecked") if row.get(key))
    lines = [f"**{case.partition(': ')[2]}**" + (f" ({'; '.join(notes)})" if notes else ""), ""]
    steps = any(row.get("tokens_per_second") is not None for row in rows)
    columns = (*COLUMNS, "tokens/s", "sampling") if steps else COLUMNS
    lines += [f"| | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(
                f"| {row['provider']} | {row['status'].upper()} {'| ' * len(columns)}| {one_line(row['reason'])} |"
            )
            continue
        cells = [
            row["provider"],
            number(row, "median", "{:,.1f} ms", 1e3),
            number(row, "ratio_to_products", "{:.2f}") + off(row),
            number(row, "tflops", "{:.3g}"),
            number(row, "peak_bytes", "{:,.1f} MB", 1e-6),
            number(row, "error", "{:.0e}"),
            number(row.get("errors") or {}, "dW others", "{:.0e}"),
        ]
        if steps:
            cells += [number(row, "tokens_per_second", "{:,.0f}"), number(row, "seconds_rollout", "{:.3g} s")]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(remarks(row))} |")
    return [*lines, ""]


def remarks(row: dict[str, Any]) -> list[str]:
    found = ["noisy"] * bool(row.get("noisy"))
    if (row.get("products") or 0) > KEPT and row.get("ratio_to_products"):
        found.append(of_kept(row["ratio_to_products"], row["products"]))
    if row.get("hot_seconds"):
        floor = row.get("hot_products_seconds")
        found.append(
            f"hot L2: {row['hot_seconds'] * 1e3:,.2f} ms" + (f", {row['hot_seconds'] / floor:.2f} ×" if floor else "")
        )
    if row.get("peak_from") == "allocator and driver":
        found.append("peak with what it holds outside of torch's allocator")
    return found


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


CURVES = {  # group: x and y in the rows, their labels, scale and whether logarithmic of y
    "cost against N": ("tokens", "ratio_to_products", "tokens N", "× products", 1.0, False),
    "cost against V": ("vocab", "ratio_to_products", "vocabulary V", "× products", 1.0, False),
    "peak memory": ("tokens", "peak_bytes", "tokens N", "peak, MB", 1e-6, True),
    "masked batches": ("live", "median", "live part of the tokens", "time, ms", 1e3, False),
}


def figure(result: Result, group: str, docs: Path) -> str | None:
    """An SVG for the groups that have one and have been measured; its path from the page, or None."""
    if group not in ("full loss", *CURVES):
        return None
    needed = CURVES[group][1] if group in CURVES else "ratio_to_products"
    measured = [row for rows in result.cases.get(group, {}).values() for row in rows if row.get(needed) is not None]
    if not measured:
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
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches: another font than the one that was measured is wider
    if group in CURVES:
        curve(result, ax, group, *CURVES[group])
    else:
        bars(measured, ax)
    ax.set_title(f"{group}, {result.title}", fontsize=10)
    figure.supxlabel(textwrap.fill(result.source, 185), fontsize=5.5, color="0.4", x=0.01, ha="left")
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "figures" / name, metadata={"Date": None})
    pyplot.close(figure)
    return f"figures/{name}"


def bars(rows: list[dict[str, Any]], ax: Any) -> None:
    """Time against the floor: a bar and its number per provider and case. A slow one ends at twice the median."""
    ratios = [row["ratio_to_products"] for row in rows]
    edge = min(max(ratios), 2 * statistics.median(ratios))
    names = [f"{row['provider']}, {row['case'].partition(': ')[2]}" for row in rows]
    colours = ["tab:blue" if row["provider"] in OUR_NAMES else "0.7" for row in rows]
    ax.figure.set_figheight(1.2 + 0.24 * len(rows))
    drawn = ax.barh(names, [min(ratio, edge) for ratio in ratios], color=colours)
    ax.bar_label(drawn, [f"{ratio:.2f}" + " →" * (ratio > edge) for ratio in ratios], padding=3, fontsize=7)
    ax.set_xlim(0, 1.2 * edge)  # room for the numbers
    ax.axvline(1, color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    cut = "; →: longer than drawn" if max(ratios) > edge else ""
    ax.set_xlabel(f"time / bare matrix products (1 is the floor{cut})", fontsize=8)


def curve(
    result: Result, ax: Any, group: str, x: str, y: str, x_label: str, y_label: str, scale: float, log: bool
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, points in result.points(group, x, y, scale).items():
        ax.plot(*zip(*points), marker="o", label=name)
    if x != "live":
        ax.set_xscale("log", base=2)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # beside: it covers no point


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
