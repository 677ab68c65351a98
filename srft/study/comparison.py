"""Methods beside each other, from the records of their runs: scores with intervals, differences, budgets, curves.

A method is one or several runs of the same settings with different seeds. A difference to the method that the others
are compared with is paired: of each seed and each prompt that both have. Its interval is over seeds and prompts
(intervals.py); where it has fewer than three, how seeds differ is taken from the methods with several.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from srft.errors import UserError, nearest
from srft.evaluation import SOLVED, levels_of, pass_at_k
from srft.intervals import Crossed, Spread, crossed, pooled
from srft.settings import differing, flat
from srft.study.matrix import BASE
from srft.study.record import Record

Values = dict[int, list[float | None]]  # by seed, of each prompt; None: not scored
BETTER, WORSE, UNSURE, UNPAIRED = "better", "worse", "cannot tell", "cannot tell: one seed"
# What runs of one method may differ in: their seeds, and what changes no number. On what they were measured is in `on`.
OWN = {
    *("train.seed", "data.seed", "model.device", "rollout.batch_size", "eval.batch_size", "eval.dir"),
    "eval.sets",
    *("reward.workers", "reward.timeout"),
}
ALIKE = {"dtype": "the type of the model", "files": "what was in their data files"}  # as their origins say
PACKAGES = {"torch": "torch", "transformers": "transformers", "Python": "python"}  # as in a run's origin
SUMS = {  # of a step; tokens that were trained on several times count as often
    "updates": lambda step: step["updates"],
    "trained": lambda step: (step["demo_tokens"] + step["rollout_tokens"]) * step["updates"],
    "generated": lambda step: step["generated_tokens"],
    "seconds": lambda step: step["seconds_rollout"] + step["seconds_train"],
}


@dataclass(frozen=True)
class Method:
    """name, and its runs by seed."""

    name: str
    runs: dict[int, Record]

    @property
    def settings(self) -> dict[str, Any]:
        return compared(next(iter(self.runs.values())))

    @property
    def budget(self) -> dict[str, float]:
        """What a run of it took, mean over seeds; NaN where its runs do not say."""
        return {name: fmean(sum(spent(run, name)) for run in self.runs.values()) for name in SUMS}


def spent(run: Record, what: str) -> list[float]:
    """By each step; NaN where it does not say, as runs of earlier versions do."""
    updates = run["settings"]["train"]["updates_per_rollout"]
    found = []
    for step in run["steps"]:
        try:
            found.append(SUMS[what]({"updates": updates, **step}))
        except (KeyError, TypeError):
            found.append(math.nan)
    return found


@dataclass(frozen=True)
class Cell:
    """A method's score in a column of the table, and how far it is from that of the method compared with.

    seeds: of the score, and of the difference.
    """

    score: Crossed
    seeds: int
    difference: Crossed | None = None
    paired: int = 0
    verdict: str = ""


@dataclass(frozen=True)
class Column:
    """A score: avg@k or pass@k of a set, or avg@k over the prompts of a group of sets. values: by method."""

    name: str
    score: str
    values: dict[str, Values]

    @property
    def prompts(self) -> int:
        return len(next(iter(next(iter(self.values.values())).values())))

    def cells(self, against: str) -> dict[str, Cell]:
        """By method, each compared with one of them."""
        share = all(0 <= each <= 1 for method in self.values.values() for row in method.values() for each in row)
        levels = {name: list(method.values()) for name, method in self.values.items()}
        differences = {
            name: paired(self.values, name, against) for name in self.values if name != against and against in levels
        }
        # The base has no seeds, so that what is between it and a method tells half of what is between two of them.
        two = [rows for name, rows in differences.items() if BASE not in (name, against)]
        spread, of_differences = spread_of(list(levels.values())), spread_of(two)
        cells = {}
        for name, rows in levels.items():
            score = crossed(rows, None if name == BASE else spread, share)
            cells[name] = Cell(score, len(rows))
            if rows := differences.get(name):
                difference = crossed(rows, of_differences)
                told = verdict(difference, len(rows) > 1 or of_differences is not None)
                cells[name] = Cell(score, cells[name].seeds, difference, len(rows), told)
        return cells


@dataclass(frozen=True)
class Comparison:
    """against: the method that the others are compared with."""

    methods: dict[str, Method]
    against: str
    columns: list[Column]

    @property
    def outcome(self) -> Column:
        """What methods are judged by: avg@k of the first set."""
        return self.columns[0]

    @property
    def ordered(self) -> list[Method]:
        """The best first; those that were not measured on the outcome last."""
        cells = self.outcome.cells(self.against)

        def lost(method: Method) -> float:
            return -cells[method.name].score.mean if method.name in cells else math.inf

        return sorted(self.methods.values(), key=lost)

    @property
    def remarks(self) -> list[str]:
        """What somebody would look for and why it is not there, and where a comparison is of more than methods."""
        return [*dropped_of(self), *of_other_data(self)]

    @property
    def machines(self) -> list[str]:
        """Where the runs were made, and with which code."""
        known = [run["origin"] for method in self.methods.values() for run in method.runs.values() if run["origin"]]
        lines = []
        for each in known:
            packages = ", ".join(f"{name} {each.get(key, '?')}" for name, key in PACKAGES.items())
            code = each.get("commit") or f"unknown, srft {each.get('srft', '?')}"
            lines.append(f"commit {code}; {each.get('machine', '?')}; {packages}")
        return list(dict.fromkeys(lines))

    def curve(self, method: Method, x: str, y: str) -> list[tuple[float, float]]:
        """Mean over seeds at each step: y, a metric or "reward" (held-out), over x: updates or another of SUMS.

        Held-out rewards of methods that were measured in another way are not there.
        """
        of_runs = [points(run, x, y, self.held_out) for run in method.runs.values()]
        steps = [step for step in of_runs[0] if all(step in each for each in of_runs)]
        return [tuple(fmean(each[step][axis] for each in of_runs) for axis in (0, 1)) for step in steps]

    @property
    def held_out(self) -> str | None:
        """How the held-out rewards of the method compared with were measured."""
        runs = self.methods[self.against].runs.values()
        return next((run["curve"][-1].get("on") for run in runs if run["curve"]), None)


def compare(records: Sequence[Record], against: str = "") -> Comparison:
    """Raises UserError where runs of one method have different settings, or nothing was measured."""
    methods = methods_of(records)
    if against and against not in methods:
        raise UserError(
            f"--against {against}: there is no such method{nearest(against, methods)} ({', '.join(methods)})"
        )
    trained = [name for name in methods if name != BASE]
    if not trained:
        raise UserError("there is no run to compare: none has finished")
    measured = [name for name in trained if common_sets(methods[name])]
    if not measured or (against and not common_sets(methods[against])):
        found = f"{against or 'no run'}: no scores of completions to compare"
        raise UserError(f"{found}: give the runs eval.prompts or eval.sets, and data with answers")
    against = against or measured[0]
    sets = common_sets(methods[against])
    columns = [each for wanted in sets.values() for each in columns_of(wanted, methods)]
    first = next(iter(sets.values()))["group"]
    for group in dict.fromkeys(each["group"] for each in sets.values() if each["group"] != first):
        own = [each for each in sets.values() if each["group"] == group]
        if len(own) > 1:
            columns.append(column(f"{group}: prompts of {len(own)} sets", "avg", methods, own, mean_of_scored))
    if not columns[0].prompts:
        raise UserError(
            f"{columns[0].name}: none of its prompts was scored in all runs; without the run that lacks it?"
        )
    return Comparison(methods, against, [each for each in columns if each.prompts])


def of_other_data(comparison: Comparison) -> Iterator[str]:
    """Methods that differ in more than their settings."""
    first = comparison.methods[comparison.against].runs
    for name, method in comparison.methods.items():
        if name == BASE:
            continue
        pairs = [(run, first[seed]) for seed, run in method.runs.items() if seed in first]
        if any(run["settings"]["data"].get("seed") != other["settings"]["data"].get("seed") for run, other in pairs):
            yield f"{name}: with the same train.seed it had other train prompts than {comparison.against} (data.seed)."
        for key, what in ALIKE.items():
            if any(unlike(run["origin"], other["origin"], key) for run, other in pairs):
                yield f"{name}: its runs differ from those of {comparison.against} in {what}."


def dropped_of(comparison: Comparison) -> Iterator[str]:
    outcome, against = comparison.outcome, comparison.against
    cells = outcome.cells(against)
    for name, method in comparison.methods.items():
        runs = list(method.runs.values())
        named = dict.fromkeys(each["name"] for run in runs for each in run["sets"])
        for lost in [each for each in named if each not in common_sets(method)]:
            yield f"{lost}: not all runs of {name} were measured on it in the same way."
        cell = cells.get(name)
        if cell is None:
            yield f"{name}: not measured on {outcome.name} as {against} was."
        elif cell.seeds < len(runs):
            yield f"{name}: {cell.seeds} of its {len(runs)} runs were measured on {outcome.name} as {against} was."
        elif name != against and not cell.paired:
            yield f"{name}: no seed in common with {against}."


def methods_of(records: Sequence[Record]) -> dict[str, Method]:
    """In the order of the records, the base last."""
    methods: dict[str, Method] = {}
    for record in sorted(records, key=lambda each: each["method"] == BASE):
        method = methods.setdefault(record["method"], Method(record["method"], {}))
        if record["seed"] in method.runs:
            raise UserError(f"{method.name}: two runs of seed {record['seed']}; give one of them another name")
        if method.runs and (other := differing(method.settings, compared(record))):
            key, (one, another) = next(iter(other.items()))
            raise UserError(
                f"{method.name}: its runs differ in {key}: {one!r} and {another!r}; runs of one method differ in seeds"
            )
        for key, other in itertools.product(ALIKE, method.runs.values()):
            if unlike(other["origin"], record["origin"], key):
                what, found = ALIKE[key], f"{other['origin'][key]} and {record['origin'][key]}"
                raise UserError(
                    f"{method.name}: its runs differ in {what}: {found}; runs of one method differ in seeds"
                )
        method.runs[record["seed"]] = record
    return methods


def unlike(one: dict[str, Any], another: dict[str, Any], key: str) -> bool:
    """Do two origins say different things? Those of earlier versions say less."""
    return None not in (one.get(key), another.get(key)) and one[key] != another[key]


def compared(record: Record) -> dict[str, Any]:
    """Its settings by section.name, without what runs of one method may differ in."""
    settings = flat(record["settings"])
    return {key: value for key, value in settings.items() if key not in OWN and not key.startswith("run.")}


def common_sets(method: Method) -> dict[str, dict[str, Any]]:
    """What all of its runs were measured on, by name."""
    first, *others = method.runs.values()
    return {each["name"]: each for each in first["sets"] if all(found_in(run, each) is not None for run in others)}


def found_in(run: Record, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What a run has of a set; None where it was not measured on it, or in another way."""
    return next((each for each in run["sets"] if (each["name"], each["on"]) == (wanted["name"], wanted["on"])), None)


def columns_of(wanted: dict[str, Any], methods: dict[str, Method]) -> list[Column]:
    """avg@k of a set, and pass@n for n = 2, 4, … k."""
    name, samples = wanted["name"], wanted["samples"]
    passes = [(f"pass@{n}", partial(passed, n=n)) for n in levels_of(samples) if n > 1]
    scores = [(f"avg@{samples}", mean_of_scored), *passes]
    return [column(name, score, methods, [wanted], value) for score, value in scores]


def mean_of_scored(rewards: list[float | None]) -> float | None:
    scored = [each for each in rewards if each is not None]
    return fmean(scored) if scored else None


def passed(rewards: list[float | None], n: int) -> float | None:
    scored = [each for each in rewards if each is not None]
    return pass_at_k(len(scored), sum(each >= SOLVED for each in scored), n) if len(scored) >= n else None


def column(
    name: str,
    score: str,
    methods: dict[str, Method],
    sets: Sequence[dict[str, Any]],
    value: Callable[[list[float | None]], float | None],
) -> Column:
    """value: of the rewards of a prompt. Prompts of several sets count alike; one without a value counts nowhere."""
    values: dict[str, Values] = {}
    for method in methods.values():
        for seed, run in method.runs.items():
            own = [found_in(run, each) for each in sets]
            if None not in own:
                values.setdefault(method.name, {})[seed] = [value(row) for each in own for row in each["rewards"]]
    rows = [row for of_seeds in values.values() for row in of_seeds.values()]
    if len(counts := {len(row) for row in rows}) > 1:
        found = " and ".join(map(str, sorted(counts)))
        raise UserError(f"{name}: records have {found} prompts of it, though measured in the same way: one is damaged")
    kept = [place for place, of_prompt in enumerate(zip(*rows)) if None not in of_prompt]
    return Column(
        name,
        score,
        {
            method: {seed: [row[place] for place in kept] for seed, row in of_seeds.items()}
            for method, of_seeds in values.items()
        },
    )


def paired(values: dict[str, Values], name: str, against: str) -> list[list[float]]:
    """Differences (seeds, prompts) of two methods; the base, which has no seeds, is paired with each."""
    one, another = values[name], values[against]
    if name == BASE:
        one = dict.fromkeys(another, next(iter(one.values())))
    if against == BASE:
        another = dict.fromkeys(one, next(iter(another.values())))
    return [[a - b for a, b in zip(one[seed], another[seed])] for seed in one if seed in another]


def spread_of(methods: Sequence[list[list[float]]]) -> Spread | None:
    """How seeds differ, of the methods with several."""
    return pooled([found for rows in methods if rows and (found := crossed(rows).seeds)])


def verdict(difference: Crossed, sure: bool) -> str:
    low, high = difference.interval
    if not sure:
        return UNPAIRED
    return BETTER if low > 0 else WORSE if high < 0 else UNSURE


def points(run: Record, x: str, y: str, on: str | None) -> dict[int, tuple[float, float]]:
    """By step."""
    places = itertools.accumulate(spent(run, x), initial=0.0)
    at = dict(zip([0, *(step["step"] for step in run["steps"])], places))
    if y == "reward":
        found = {each["step"]: each["reward"] for each in run["curve"] if each.get("on") == on}
    else:
        found = {step["step"]: share_of_demos(step) if y == "demo_share" else step.get(y) for step in run["steps"]}
    return {
        step: (at[step], value)
        for step, value in found.items()
        if value is not None and step in at and not math.isnan(at[step])
    }


def share_of_demos(step: dict[str, Any]) -> float | None:
    """Of the norms of the gradient to hidden states, that of demonstrations."""
    demo, rollout = step.get("demo_grad_norm"), step.get("rollout_grad_norm")
    return None if demo is None or rollout is None or not demo + rollout else demo / (demo + rollout)
