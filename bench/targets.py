"""What the loss head is to reach on an H200 in bf16, held against the JSON of a run: met, not met, or not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import BUDGETED_TASK, FILTERED_TASK, HEADS, Shape
from .providers import BUDGETED, FILTERED, OUR_NAMES, OURS

QWEN = HEADS["Qwen3-8B"]
MAIN, LARGE, QWEN2 = Shape(8192, *QWEN), Shape(32768, *QWEN), Shape(8192, *HEADS["Qwen2.5-7B"])
ONE_PASS = {MAIN: 0.92, QWEN2: 0.92, LARGE: 0.92, Shape(8192, *HEADS["Qwen3-1.7B"]): 0.85,
            Shape(8192, *HEADS["Qwen2.5-0.5B"]): 0.70}  # fmt: skip
SMALL = [Shape(64, *HEADS[name]) for name in ("Qwen3-8B", "Qwen2.5-0.5B")]
GIB = 2**30

Row = dict[str, Any]
Find = Callable[[list[Row]], tuple[float, list[Row]] | None]  # rows of a run → a number, and the rows that it is from


@dataclass(frozen=True)
class Target:
    """A number that is to be `bound` at least, or at most where `most`; `where`: the case that decides is told."""

    what: str
    bound: float
    find: Find
    form: str = "{:.2f}"
    most: bool = False
    where: bool = False

    def told(self, rows: list[Row]) -> tuple[str, str, str, str]:
        """(what, goal, found, verdict)"""
        goal = f"{'≤' if self.most else '≥'} {self.form.format(self.bound)}"
        if (found := self.find(rows)) is None:
            return self.what, goal, "–", "not measured"
        number, of = found
        shown = self.form.format(number) + f" ({of[-1]['provider']}, {of[-1]['case']})" * self.where
        met = number <= self.bound if self.most else number >= self.bound
        return self.what, goal, shown, ("met" if met else "NOT MET") + ", noisy" * any(row.get("noisy") for row in of)


def first(rows: list[Row], shape: Shape, task: str, provider: str = OURS.name, **more: Any) -> Row | None:
    wanted = {"task": task, "provider": provider, "live": 1.0} | vars(shape) | more
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def number(of: Callable[[Row], float], *which: Any) -> Find:
    """A number of one row."""
    return lambda rows: (row := first(rows, *which)) and (of(row), [row])


def share(row: Row) -> float:
    """Of the products' time in the call's."""
    return 1 / row["ratio_to_products"]


def over(shape: Shape, part: dict[str, Any], whole: dict[str, Any]) -> Find:
    """The time of a row over that of another one on the same kind of inputs."""

    def find(rows: list[Row]) -> tuple[float, list[Row]] | None:
        a = first(rows, shape, **part)
        b = a and first(rows, shape, inputs=a["inputs"], **whole)
        return b and (a["median"] / b["median"], [a, b])

    return find


def workspace(rows: list[Row]) -> tuple[float, list[Row]] | None:
    """The most GiB in one pass, beside the gradients returned in 16 bits, and beside dW in fp32 or 16-bit gradients of
    8192 tokens, whichever is more."""
    beside = {
        (
            row["peak_bytes"]
            - 2 * (row["tokens"] + row["vocab"]) * row["hidden"]
            - max(4 * row["vocab"] * row["hidden"], 2 * 8192 * row["vocab"])
        )
        / GIB: row
        for row in rows
        if row["task"] == "srft"
        and row["provider"] == OURS.name
        and not row["case"].startswith(("training step", "packed rows"))
    }
    return (max(beside), [beside[max(beside)]]) if beside else None


def fastest_peer(rows: list[Row]) -> tuple[float, list[Row]] | None:
    """The least of a peer's time over ours. Who is timed in a case computes all of it, and exactly enough."""
    ours = {row["case"]: row for row in rows if row["provider"] == OURS.name}
    peers = [row for row in rows if row["provider"] not in OUR_NAMES and row["case"] in ours]
    found = [(row["median"] / ours[row["case"]]["median"], [ours[row["case"]], row]) for row in peers]
    return min(found, key=lambda each: each[0], default=None)


FILTERED_ROW = {"task": FILTERED_TASK, "provider": FILTERED.name}
TARGETS = (
    *(Target(f"SRFT in one pass, {at}: share of the products", least, number(share, at, "srft"))
      for at, least in ONE_PASS.items()),
    *(Target(f"{task}, {at}: share of the products", least, number(share, at, task))
      for task, least in (("scoring", 0.93), ("two pass", 0.90)) for at in (MAIN, QWEN2, LARGE)),
    Target(f"frozen head, {MAIN}: of the full time", 0.70,
           over(MAIN, {"task": "frozen head"}, {"task": "cross entropy"}), most=True),
    Target(f"10 % of the tokens live, {LARGE}: of the full time", 0.13,
           over(LARGE, {"task": "cross entropy", "live": 0.1}, {"task": "cross entropy"}), most=True),
    Target("workspace beside gradients and dW in fp32 or ∂L/∂a of 8192, GiB", 1, workspace, most=True, where=True),
    Target(f"256 MiB of workspace, {MAIN}: of the default's time", 1.25,
           over(MAIN, {"task": BUDGETED_TASK, "provider": BUDGETED.name}, {"task": BUDGETED_TASK}), most=True),
    Target(f"filtered backward, {MAIN}: of the dense time", 0.60,
           over(MAIN, FILTERED_ROW, {"task": FILTERED_TASK}), most=True),
    Target(f"filtered backward, {MAIN}: error of dx and dW", 1e-2,
           number(lambda row: max(row["errors"]["dx"], row["errors"]["dW"]), MAIN, *FILTERED_ROW.values()),
           "{:.0e}", most=True),
    *(Target(f"small call, {at}: µs beyond the products", 100,
             number(lambda row: 1e6 * (row["median"] - row["products_seconds"]), at, "srft"), "{:.0f}", most=True)
      for at in SMALL),
    Target("the fastest peer's time over ours", 1, fastest_peer, where=True),
)  # fmt: skip


def evaluate(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, goal, found, verdict) of each target in the JSON of a run. A CPU's has measured none of them."""
    cuda = result.get("machine_info", {}).get("kind") == "cuda"
    rows = [row["extra_info"] | {"median": row["stats"]["median"]} for row in result["benchmarks"] if cuda]
    return [target.told(rows) for target in TARGETS]
