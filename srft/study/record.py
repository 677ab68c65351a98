"""What is kept of a run to compare it with others: its settings, steps and scores, without texts and weights.

A record is one JSON object:
    method, seed      as in the study; of other runs the directory's name and train.seed
    origin, settings  code and machine, and the whole configuration
    steps             lines of metrics.jsonl
    curve             [{step, reward, loss}] of the evaluations during the run
    sets              [{name, group, on, samples, rewards: [[…] of each prompt], finished, tokens}] of those after it
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srft.errors import UserError
from srft.metrics import mean
from srft.rundir import ORIGIN, finite, read_jsonl, read_status
from srft.settings import load
from srft.study.matrix import BASE, EVALUATION

Record = dict[str, Any]
KEYS = ("method", "seed", "origin", "settings", "steps", "curve", "sets")
DIGITS = 5


def record_of(directory: Path) -> Record:
    """Of a run that finished, or of a base that was measured. Raises UserError where it is neither."""
    config_file = directory / "config.toml"
    evaluated = directory / EVALUATION
    base = not config_file.is_file() and (evaluated / "config.toml").is_file()
    if not base:
        status = read_status(directory)
        if not config_file.is_file() or status is None:
            raise UserError(f"{directory}: expected the directory of a run, a study, or records of runs")
        if status["state"] != "finished":
            raise UserError(f"{directory}: the run is {status['state']}, after step {status['step']}; let it finish")
    config = load(str(evaluated / "config.toml" if base else config_file))
    name, seed = directory.resolve().name, config.train.seed
    evaluations = read_jsonl(directory / "evaluation.jsonl")
    found = {
        "steps": read_jsonl(directory / "metrics.jsonl"),
        "curve": [{key: row.get(key) for key in ("step", "reward", "loss")} for row in evaluations],
        "sets": list(sets_of(evaluated) if evaluated.is_dir() else held_out_of(evaluations)),
    }
    return {
        "method": BASE if base else name.removesuffix(f"-{seed}"),
        "seed": seed,
        "origin": json.loads((directory / ORIGIN).read_text()) if (directory / ORIGIN).exists() else {},
        "settings": dataclasses.asdict(config),
        **rounded(finite(found)),
    }


def sets_of(evaluated: Path) -> Iterator[dict[str, Any]]:
    """What `srft eval` found, in the order of its sets."""
    scores = json.loads((evaluated / "scores.json").read_text(encoding="utf-8"))
    generations = read_jsonl(evaluated / "generations.jsonl")
    for each in scores.get("sets", []):
        yield measured(each["set"], each, [row for row in generations if row["set"] == each["set"]])


def held_out_of(evaluations: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of a run that was measured on nothing else, its last evaluation."""
    if evaluations and evaluations[-1]["generations"]:
        yield measured("held-out", evaluations[-1], evaluations[-1]["generations"])


def measured(name: str, scores: dict[str, Any], generations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "group": scores.get("group", ""),
        "on": scores.get("on", ""),
        "samples": scores["samples"],
        # One that could not be graded is wrong, as in the table of `srft eval`.
        "rewards": [[reward or 0.0 for reward in row["rewards"]] for row in generations],
        "finished": mean([float(each) for row in generations for each in row["finished"]]),
        "tokens": mean([float(each) for row in generations for each in row["tokens"]]),
    }


def rounded(value: Any) -> Any:
    """To five digits, as whole numbers where they are: a record is read by people too, and kept in repositories."""
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def read_record(file: Path) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a record of a run: {error}") from error
    if not isinstance(record, dict) or (lacking := [key for key in KEYS if key not in record]):
        found = f"it has no {lacking[0]}" if isinstance(record, dict) else "it is no JSON object"
        raise UserError(f"{file}: not a record of a run, as `srft compare` writes them: {found}")
    return record


def written(record: Record) -> str:
    """As JSON, a step and a set to a line."""
    lines = []
    for key in KEYS:
        value = record[key]
        if key in ("steps", "curve", "sets"):
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f' "{key}": [\n  {rows}\n ]' if value else f' "{key}": []')
        else:
            lines.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
