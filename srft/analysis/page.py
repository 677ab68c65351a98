"""The page of `srft analyze`, and the table that it begins with."""

import math
from collections.abc import Iterator
from typing import Any

from srft.analysis.models import BASE, DEMONSTRATIONS
from srft.analysis.texts import TASK
from srft.intervals import shown
from srft.metrics import mean
from srft.pages import number, percent, render, svg

WRITERS = {DEMONSTRATIONS: "demonstrations", BASE: "the base's completions", "own": "its own completions"}


def table_of(result: dict[str, Any]) -> list[list[str]]:
    """A row of each model."""
    others = [name for name in result["sets"] if name != TASK]
    header = [
        "model",
        "reward",
        "95 %",
        *(["other tasks"] if others else []),
        "KL from base",
        *(["on others"] if others else []),
    ]
    header += ["tokens changed", "shifted", "entropy", "of demonstrations", "gradient of these", "cosine", "weights"]
    rows = [header]
    for name, model in result["models"].items():
        own = model["shift"][TASK]
        cells = [
            name,
            number(model["rewards"][TASK]["reward"]),
            shown(model["rewards"][TASK]["interval"], "{:.2f} – {:.2f}"),
        ]
        cells += [number(reward_of(model, others))] if others else []
        cells += [number(own[BASE]["kl"], 4)] + ([number(kl_of(model, others), 4)] if others else [])
        demos = own.get(DEMONSTRATIONS, {})
        cells += [percent(own[name]["changed"]), percent(own[name]["shifted"]), number(own[name]["entropy_after"])]
        cells += [number(demos.get("entropy_after")), percent(model["gradients"]["share"])]
        cells += [number(model["gradients"]["cosine"]), percent(model["weights"] and model["weights"]["share"])]
        rows.append(cells)
    return rows


def reward_of(model: dict[str, Any], sets: list[str]) -> float:
    return mean([model["rewards"][name]["reward"] for name in sets])


def kl_of(model: dict[str, Any], sets: list[str]) -> float:
    """Mean of the sets, each on the base's completions."""
    return mean([model["shift"][name][BASE]["kl"] for name in sets])


def page(name: str, result: dict[str, Any]) -> str:
    return render(
        "analyze.html",
        name=name,
        table=table_of(result),
        figures=list(drawn(result)),
        mapped=result["map"]["shown"],
        sampled=sampled(result),
        paths={name: model["path"] for name, model in result["models"].items()},
        matrices=matrices_of(result),
        shifts=shifts_of(result),
        texts=texts_of(result),
    )


def sampled(result: dict[str, Any]) -> str:
    sets = ", ".join(f"{count} of {name}" for name, count in result["sets"].items())
    how = result["sampled"]
    return f"Prompts: {sets}; {how['samples']} completions of each at temperature {how['temperature']:g}"


def drawn(result: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The figures that have something in them."""
    models = result["models"]
    others = [name for name in result["sets"] if name != TASK]
    trained = {name: model for name, model in models.items() if name != BASE}
    models = trained | {BASE: models[BASE]}  # last, so that a model has one colour in all figures
    figures = [("KL from base, and reward", "reward", "KL(base ‖ model), nats per token", {
        name: [(model["shift"][TASK][BASE]["kl"], model["rewards"][TASK]["reward"])] for name, model in models.items()
    })]  # fmt: skip
    if others:
        figures.append(("KL from base on other tasks, and their reward", "reward", "KL(base ‖ model), nats per token", {
            name: [(kl_of(model, others), reward_of(model, others))] for name, model in models.items()
        }))  # fmt: skip
    for writer, told in WRITERS.items():
        lines = {name: model["histograms"].get(writer, []) for name, model in trained.items()}
        figures.append((f"Change of {told}", "share per nat", "Δ log p, nats", lines))
    for key, title, over in (
        ("by_position", "Change by position", "token of the completion"),
        ("by_entropy", "Change by entropy", "entropy before, nats"),
    ):
        figures.append((title, "mean |Δ log p|", over, {name: model[key] for name, model in trained.items()}))
    for writer, title in ((BASE, "The base, with tokens of the model"), ("", "The model, with tokens of the base")):
        lines = {
            name: [
                (each["swapped"], each["reward"]) for each in model["crossing"] if each["writer"] == (writer or name)
            ]
            for name, model in trained.items()
        }
        figures.append((title, "reward", "share of tokens swapped", lines))
    figures += maps(result["map"]["points"], list(trained))
    for title, unit, over, lines in figures:
        if lines := {name: points for name, points in lines.items() if known(points)}:
            yield {"title": title, "svg": svg(title, lines, unit, over=over, whole=False)}


def known(points: list[tuple[float, float | None]]) -> bool:
    return bool(points) and all(y is not None and math.isfinite(y) for _, y in points)


def maps(points: list[dict[str, Any]], names: list[str]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Where the models are, from the base through their checkpoints; and how far from the base at each step."""
    base, *_ = points
    ways = {name: [each for each in points if each["model"] == name] for name in names}
    lines = {name: [(each["x"], each["y"]) for each in [base, *way]] for name, way in ways.items()}
    yield "Map of the models", "√nats", "√nats", lines
    steps = {
        name: [(0, 0.0), *((each["step"], each["js"]) for each in way if each["step"] is not None)]
        for name, way in ways.items()
        if len(way) > 1
    }
    yield "Distance from base", "Jensen-Shannon, nats", "step", steps


def shifts_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each set, and who wrote, as a row for each model."""
    rows = []
    for name, model in result["models"].items():
        if name != BASE or len(result["models"]) == 1:
            for of_set, writers in model["shift"].items():
                rows += [{"model": name, "set": of_set, "writer": writer, **own} for writer, own in writers.items()]
    return rows


def matrices_of(result: dict[str, Any]) -> list[list[str]]:
    """The share of changed weights of each matrix, a column for each model."""
    of_models = {
        name: model["weights"]["matrices"]
        for name, model in result["models"].items()
        if model["weights"] and name != BASE
    }
    if not of_models:
        return []
    kinds = next(iter(of_models.values()))
    return [["matrix", *of_models]] + [
        [kind, *(percent(counts[kind][0] / counts[kind][1]) for counts in of_models.values())] for kind in kinds
    ]


def texts_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"model": name, **text} for name, model in result["models"].items() if name != BASE for text in model["texts"]
    ]
