"""Methods beside each other, from the records of their runs: scores with intervals, differences, budgets, curves.

A method is one or several runs of the same settings with different seeds. A difference to the method that the others
are compared with is paired: of each seed and each prompt that both have. Its interval is over seeds and prompts
(intervals.py); where it has fewer than three, how seeds differ is taken from the methods with several.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from srft.errors import UserError, nearest
from srft.evaluation import SOLVED, pass_at_k
from srft.intervals import Crossed, Spread, crossed, pooled
from srft.metrics import mean
from srft.study.matrix import BASE
from srft.study.record import Record

Values = dict[int, list[float]]  # by seed, of each prompt
BETTER, WORSE, UNSURE, UNPAIRED = "better", "worse", "cannot tell", "cannot tell: one seed"
OWN = {"train.seed", "data.seed", "run.dir"}  # what runs of one method may differ in


@dataclass(frozen=True)
class Method:
    """name, and its runs by seed."""

    name: str
    runs: dict[int, Record]

    @property
    def settings(self) -> dict[str, Any]:
        return flat(next(iter(self.runs.values()))["settings"])

    def total(self, key: str) -> float:
        """Of a metric over all steps, mean over seeds."""
        return fmean(sum(step.get(key) or 0 for step in run["steps"]) for run in self.runs.values())

    @property
    def budget(self) -> dict[str, float]:
        """What a run of it took, mean over seeds."""
        trained = self.total("demo_tokens") + self.total("rollout_tokens")
        return {
            "updates": self.updates,
            "trained": trained,
            "generated": self.total("generated_tokens"),
            "seconds": self.total("seconds_rollout") + self.total("seconds_train"),
        }

    @property
    def updates(self) -> float:
        run = next(iter(self.runs.values()))
        return len(run["steps"]) * run["settings"]["train"]["updates_per_rollout"]


@dataclass(frozen=True)
class Cell:
    """A method's score in a column of the table, and how far it is from that of the method compared with."""

    score: Crossed
    difference: Crossed | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Column:
    """A score: avg@k or pass@k of a set, or avg@k over the prompts of a group of sets. cells: by method."""

    name: str
    score: str
    cells: dict[str, Cell]
    prompts: int


@dataclass(frozen=True)
class Comparison:
    """against: the method that the others are compared with."""

    methods: dict[str, Method]
    against: str
    columns: list[Column] = field(default_factory=list)

    @property
    def outcome(self) -> Column:
        """What methods are judged by: avg@k of the first set."""
        return self.columns[0]

    @property
    def ordered(self) -> list[Method]:
        """The best first; those that were not measured on the outcome last."""

        def lost(method: Method) -> float:
            cell = self.outcome.cells.get(method.name)
            return -cell.score.mean if cell else 1.0

        return sorted(self.methods.values(), key=lost)

    @property
    def machines(self) -> list[str]:
        """Where the runs were made, and with which code."""
        known = [run["origin"] for method in self.methods.values() for run in method.runs.values() if run["origin"]]
        return list(
            dict.fromkeys(
                f"commit {each['commit'] or 'unknown, srft ' + each['srft']}; {each['machine']}; "
                f"torch {each['torch']}, transformers {each['transformers']}, Python {each['python']}"
                for each in known
            )
        )


def compare(records: Sequence[Record], against: str = "") -> Comparison:
    """Raises UserError where runs of one method have different settings, or nothing was measured."""
    methods = methods_of(records)
    trained = [name for name in methods if name != BASE]
    if against and against not in methods:
        raise UserError(
            f"--against {against}: there is no such method{nearest(against, methods)} ({', '.join(methods)})"
        )
    if not trained:
        raise UserError("there is no run to compare: none has finished")
    against = against or trained[0]
    sets = sets_of(methods[against])
    if not sets:
        raise UserError(f"{against} was measured on nothing: give its runs eval.sets, or eval.prompts")
    columns = [each for name, group in sets.items() for each in columns_of(name, group, methods, against)]
    first = next(iter(sets.values()))["group"]
    others = [name for name, each in sets.items() if each["group"] != first]
    for group in dict.fromkeys(sets[name]["group"] for name in others):
        names = [name for name in others if sets[name]["group"] == group]
        if len(names) > 1:
            label = f"{group}: {len(names)} sets"
            columns.append(column(label, "avg", methods, against, lambda run, names=names: joined(run, names, sets)))
    return Comparison(methods, against, columns)


def methods_of(records: Sequence[Record]) -> dict[str, Method]:
    """In the order of the records, the base last."""
    methods: dict[str, Method] = {}
    for record in sorted(records, key=lambda each: each["method"] == BASE):
        method = methods.setdefault(record["method"], Method(record["method"], {}))
        if record["seed"] in method.runs:
            raise UserError(f"{method.name}: two runs of seed {record['seed']}; give one of them another name")
        if method.runs and (other := differing(method.settings, flat(record["settings"]))):
            key, (one, another) = next(iter(other.items()))
            raise UserError(
                f"{method.name}: its runs differ in {key}: {one!r} and {another!r}; runs of one method differ in seeds"
            )
        method.runs[record["seed"]] = record
    return methods


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """By section.name, without what runs of one method differ in."""
    pairs = {f"{section}.{name}": value for section, own in settings.items() for name, value in own.items()}
    return {key: value for key, value in pairs.items() if key not in OWN}


def differing(one: dict[str, Any], another: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (one.get(key), another.get(key)) for key in {**one, **another} if one.get(key) != another.get(key)}


def sets_of(method: Method) -> dict[str, dict[str, Any]]:
    """What all of its runs were measured on, by name."""
    runs = list(method.runs.values())
    return {each["name"]: each for each in runs[0]["sets"] if all(of_run(run, each) is not None for run in runs[1:])}


def of_run(run: Record, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What a run has of a set; None where it was not measured on it, or in another way."""
    return next((each for each in run["sets"] if (each["name"], each["on"]) == (wanted["name"], wanted["on"])), None)


def columns_of(name: str, wanted: dict[str, Any], methods: dict[str, Method], against: str) -> list[Column]:
    """avg@k of a set, and pass@n for n = 2, 4, … k."""
    samples = wanted["samples"]

    def averages(run: Record) -> list[float] | None:
        own = of_run(run, wanted)
        return own and [mean(rewards) for rewards in own["rewards"]]

    def passes(run: Record, n: int) -> list[float] | None:
        own = of_run(run, wanted)
        return own and [pass_at_k(len(r), sum(each >= SOLVED for each in r), n) for r in own["rewards"]]

    levels = sorted({2**i for i in range(1, samples.bit_length()) if 2**i <= samples} | ({samples} - {1}))
    return [
        column(name, f"avg@{samples}", methods, against, averages),
        *(column(name, f"pass@{n}", methods, against, lambda run, n=n: passes(run, n)) for n in levels),
    ]


def joined(run: Record, names: list[str], sets: dict[str, dict[str, Any]]) -> list[float] | None:
    """The prompts of several sets, which count alike."""
    of_sets = [of_run(run, sets[name]) for name in names]
    if None in of_sets:
        return None
    return [mean(rewards) for each in of_sets for rewards in each["rewards"]]


def column(
    name: str, score: str, methods: dict[str, Method], against: str, values: Callable[[Record], list[float] | None]
) -> Column:
    """values: of each prompt of a run."""
    known: dict[str, Values] = {}
    for method in methods.values():
        found = {seed: each for seed, run in method.runs.items() if (each := values(run)) is not None}
        if found:
            known[method.name] = found
    share = all(0 <= each <= 1 for of_seeds in known.values() for row in of_seeds.values() for each in row)
    levels = {name: list(of_seeds.values()) for name, of_seeds in known.items()}
    differences = {name: paired(of_seeds, known[against], name) for name, of_seeds in known.items() if name != against}
    spread, spread_of_differences = spread_of(levels.values()), spread_of(differences.values())
    cells = {}
    for each, rows in levels.items():
        score_of = crossed(rows, None if each == BASE else spread, share)
        rows = differences.get(each)
        if rows:
            difference = crossed(rows, spread_of_differences)
            sure = len(rows) > 1 or spread_of_differences is not None
            cells[each] = Cell(score_of, difference, verdict(difference, sure))
        else:
            cells[each] = Cell(score_of)
    return Column(name, score, cells, len(next(iter(levels[against]))))


def paired(one: Values, another: Values, name: str) -> list[list[float]]:
    """Differences (seeds, prompts); the base, which has no seed, is paired with each."""
    if name == BASE:
        one = dict.fromkeys(another, next(iter(one.values())))
    return [[a - b for a, b in zip(one[seed], another[seed])] for seed in one if seed in another]


def spread_of(rows: Any) -> Spread | None:
    """How seeds differ, of the methods with several."""
    return pooled([found for each in rows if each and (found := crossed(each).seeds)])


def verdict(difference: Crossed, sure: bool) -> str:
    low, high = difference.interval
    if not sure:
        return UNPAIRED
    return BETTER if low > 0 else WORSE if high < 0 else UNSURE


# ---- curves


def curve(method: Method, x: str, y: str) -> list[tuple[float, float]]:
    """Mean over seeds at each step: y, a metric or "reward" (held-out), over x: updates or one of SUMS."""
    of_runs = [points(run, x, y) for run in method.runs.values()]
    steps = [step for step in of_runs[0] if all(step in each for each in of_runs)]
    return [tuple(fmean(each[step][axis] for each in of_runs) for axis in (0, 1)) for step in steps]


SUMS = {
    "trained": ("demo_tokens", "rollout_tokens"),
    "generated": ("generated_tokens",),
    "seconds": ("seconds_rollout", "seconds_train"),
}


def points(run: Record, x: str, y: str) -> dict[int, tuple[float, float]]:
    """By step."""
    steps = run["steps"]
    if x == "updates":
        places = [run["settings"]["train"]["updates_per_rollout"]] * len(steps)
    else:
        places = [sum(step.get(key) or 0 for key in SUMS[x]) for step in steps]
    at = dict(zip([0, *(step["step"] for step in steps)], itertools.accumulate(places, initial=0)))
    if y == "reward":
        found = {each["step"]: each["reward"] for each in run["curve"]}
    else:
        found = {step["step"]: share_of_demos(step) if y == "demo_share" else step.get(y) for step in steps}
    return {step: (at[step], value) for step, value in found.items() if value is not None and step in at}


def share_of_demos(step: dict[str, Any]) -> float | None:
    """Of the norms of the gradient to hidden states, that of demonstrations."""
    demo, rollout = step.get("demo_grad_norm"), step.get("rollout_grad_norm")
    return None if demo is None or rollout is None or not demo + rollout else demo / (demo + rollout)
