"""The page of `srft compare`."""

from collections.abc import Iterator, Sequence
from typing import Any

from srft.pages import render, svg
from srft.settings import differing
from srft.study.comparison import Comparison, Method
from srft.study.matrix import BASE

CURVES = [  # title, metric, unit of y
    ("Reward of the rollouts", "reward_mean", ""),
    ("Entropy on demonstrations", "demo_entropy", "nats"),
    ("Entropy on rollouts", "rollout_entropy", "nats"),
    ("Weight of demonstrations", "demo_weight", "SFT term"),
    ("Weight of rollouts", "rollout_weight", "positives"),
    ("Demonstrations' share of the gradient", "demo_share", "at hidden states"),
    ("Gradient norm", "grad_norm", "before clipping"),
    ("Length of a rollout", "response_tokens", "tokens"),
]
AXES = {"updates": "updates", "trained": "tokens trained on", "generated": "tokens generated", "seconds": "seconds"}
SEVERAL = 8  # lines in a figure


def page(comparison: Comparison, name: str, table: list[list[str]], notes: Sequence[str]) -> str:
    """table: the one that is printed."""
    methods = [each for each in comparison.methods.values() if each.name != BASE]
    most = max(len(method.runs) for method in methods)
    several = [each for each in methods if len(each.runs) == most]
    others = [each for each in methods if each not in several]
    groups = [each for group in (several, others) for each in chunks(group, SEVERAL)]
    return render(
        "compare.html",
        name=name,
        table=table,
        notes=notes,
        matrix=matrix_of(comparison, several),
        sets=tables_of(comparison),
        blocks=[block for group in groups if (block := drawn(comparison, group))["figures"]],
        against=comparison.against,
        settings=settings_of(comparison),
        verdicts={"better": "good", "worse": "bad"},
    )


def chunks(items: list[Method], size: int) -> Iterator[list[Method]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def drawn(comparison: Comparison, methods: list[Method]) -> dict[str, Any]:
    """The figures of some methods."""
    figures = []
    for axis, over in AXES.items():
        lines = {each.name: comparison.curve(each, axis, "reward") for each in methods}
        figures.append(("Held-out reward", lines, "", over))
    for title, key, unit in CURVES:
        lines = {each.name: comparison.curve(each, "updates", key) for each in methods}
        figures.append((title, lines, unit, "updates"))
    drawings = []
    for title, lines, unit, over in figures:
        if any(lines.values()):
            salt = f"{title} {over} {methods[0].name}"
            caption = f"{title} over {over}" if title == "Held-out reward" else title
            drawings.append({"title": caption, "svg": svg(salt, lines, unit, over=over)})
    seeds = sorted({len(each.runs) for each in methods})
    told = f"mean of {seeds[0]} seeds" if seeds[0] > 1 else "one seed each"
    return {"title": told, "figures": drawings}


def matrix_of(comparison: Comparison, methods: Sequence[Method]) -> dict[str, Any] | None:
    """Each of some methods against each: differences of the outcome."""
    outcome = comparison.outcome
    names = [each.name for each in comparison.ordered if each in methods and each.name in outcome.values]
    if len(names) < 2:
        return None
    columns = {against: outcome.cells(against) for against in names}
    rows = [{"name": name, "cells": [columns[each][name] for each in names]} for name in names]
    return {"names": names, "rows": rows}


def tables_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Each set as a table: a row for each method, a column for each score."""
    tables, order = [], [each.name for each in comparison.ordered]
    for name in dict.fromkeys(each.name for each in comparison.columns):
        columns = [each for each in comparison.columns if each.name == name]
        cells = [each.cells(comparison.against) for each in columns]
        methods = [each for each in order if each in cells[0]]
        rows = [{"name": method, "cells": [each[method] for each in cells]} for method in methods]
        tables.append({"name": name, "prompts": columns[0].prompts, "scores": [c.score for c in columns], "rows": rows})
    return tables


def settings_of(comparison: Comparison) -> dict[str, Any]:
    """What each method sets, where it is not what the method compared with sets."""
    own = comparison.methods[comparison.against].settings
    return {
        method.name: {key: pair[0] for key, pair in differing(method.settings, own).items()}
        for method in comparison.methods.values()
        if method.name not in (comparison.against, BASE)
    }
