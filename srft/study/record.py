"""What is kept of a run to compare it with others: its settings, steps and scores, without texts and weights.

A record is one JSON object:
    method, seed      as in the study; of other runs the directory's name and train.seed
    origin, settings  code, machine and data files, and the whole configuration
    steps             lines of metrics.jsonl
    curve             [{step, on, reward, loss}] of the evaluations during the run
    sets              [{name, group, on, samples, rewards: [[…] of each prompt], finished, tokens}] of those after it
Only what has the same `on` was measured on the same prompts, sampled and graded in the same way.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.errors import UserError
from srft.metrics import mean
from srft.resume import DATA
from srft.rundir import ORIGIN, finite, read_jsonl, read_status
from srft.settings import load
from srft.study.matrix import BASE, EVALUATION, is_name

Record = dict[str, Any]
KEYS = {"method": str, "seed": int, "origin": dict, "settings": dict, "steps": list, "curve": list, "sets": list}
OF_SET = {"name": str, "group": str, "on": str, "samples": int, "rewards": list}
OF_STEP = OF_CURVE = {"step": int}
DIGITS = 5


def is_base(directory: Path) -> bool:
    """Whether it holds an evaluation of a model that no run made."""
    return (directory / EVALUATION / "config.toml").is_file() and not (directory / "config.toml").exists()


def is_run(directory: Path) -> bool:
    return (directory / "config.toml").is_file() and (directory / "status.json").is_file()


def record_of(directory: Path, asked: Config | None = None) -> Record:
    """Of a run that finished, or of a base that was measured. asked: the settings it was asked for.

    Raises UserError where it is neither, or is damaged.
    """
    base = is_base(directory)
    if not base and not is_run(directory):
        raise UserError(f"{directory}: expected a directory of a run, of a study, or one that srft compare wrote")
    try:
        return of_base(directory) if base else of_run(directory, asked)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{directory}: the run's files are damaged: {type(error).__name__}: {error}") from error


def of_base(directory: Path) -> Record:
    evaluated = directory / EVALUATION
    settings = dataclasses.asdict(load(str(evaluated / "config.toml")))
    sets = rounded(finite(list(evaluated_sets(evaluated, settings))))
    return {"method": BASE, "seed": 0, "origin": {}, "settings": settings, "steps": [], "curve": [], "sets": sets}


def of_run(directory: Path, asked: Config | None) -> Record:
    status, config = read_status(directory) or {"state": "damaged", "step": 0}, load(str(directory / "config.toml"))
    if status["state"] != "finished":
        raise UserError(f"{directory}: the run is {status['state']}, after step {status['step']}; let it finish")
    settings = dataclasses.asdict(asked or config)
    seed, name = config.train.seed, directory.resolve().name
    method = name.removesuffix(f"-{seed}")
    if method == BASE:
        raise UserError(f"{directory}: {BASE} is the model as it was; give the directory of the run another name")
    steps, evaluations = read_jsonl(directory / "metrics.jsonl"), read_jsonl(directory / "evaluation.jsonl")
    if len(steps) != status["step"]:
        raise UserError(f"{directory}: metrics.jsonl has {len(steps)} of the run's {status['step']} steps")
    measured = directory / EVALUATION
    sets = list(evaluated_sets(measured, settings)) if measured.is_dir() else []
    if not sets and evaluations and evaluations[-1]["step"] == status["step"]:  # of the run's end, not of its middle
        sets = list(held_out_of(evaluations[-1], settings))
    curve = [{key: row.get(key) for key in ("step", "on", "reward", "loss")} for row in evaluations]
    origin = read_json(directory / ORIGIN)
    if files := read_json(directory / DATA).get("files"):
        origin["files"] = files
    found = rounded(finite({"steps": steps, "curve": curve, "sets": sets}))
    return {"method": method, "seed": seed, "origin": origin, "settings": settings, **found}


def read_json(file: Path) -> dict[str, Any]:
    """{} where there is no such file, as in runs of earlier versions."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file.parent}: the run's files are damaged: {file.name}: {error}") from error


def evaluated_sets(evaluated: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `srft eval` found, in the order of its sets. What could not be graded is wrong, as in its table."""
    scores = json.loads((evaluated / "scores.json").read_text(encoding="utf-8"))
    generations = read_jsonl(evaluated / "generations.jsonl")
    for each in scores.get("sets", []):
        rows = [row for row in generations if row["set"] == each["set"]]
        if [len(row["rewards"]) for row in rows] != [each["samples"]] * each["prompts"]:
            found = f"generations.jsonl has not {each['samples']} completions of each of {each['prompts']} prompts"
            raise ValueError(f"{found} of {each['set']}")
        rewards = [[reward or 0.0 for reward in row["rewards"]] for row in rows]
        yield as_set(each["set"], each, rows, rewards, settings["reward"]["mark"])


def held_out_of(evaluation: dict[str, Any], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the run itself found last; what was not scored is left out, as in its table."""
    if rows := evaluation["generations"]:
        graded = " ".join(str(settings["reward"][key]) for key in ("name", "weights", "mark"))
        yield as_set("held-out", evaluation, rows, [row["rewards"] for row in rows], graded)


def as_set(
    name: str, scores: dict[str, Any], rows: list[dict[str, Any]], rewards: list[list[float | None]], graded: str
) -> dict[str, Any]:
    return {
        "name": name,
        "group": scores.get("group", ""),
        "on": f"{scores['on']} {graded}",
        "samples": scores["samples"],
        "rewards": rewards,
        "finished": mean([float(each) for row in rows for each in row["finished"]]),
        "tokens": mean([float(each) for row in rows for each in row["tokens"]]),
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
    no_record = f"{file}: not a record of a run, as `srft compare` writes them"
    if not isinstance(record, dict):
        raise UserError(f"{no_record}: it is no JSON object")
    check_kinds(record, KEYS, no_record)
    for key, kinds in (("sets", OF_SET), ("steps", OF_STEP), ("curve", OF_CURVE)):
        for number, each in enumerate(record[key], 1):
            check_kinds(each, kinds, f"{no_record}: {key}[{number}]")
    for each in record["sets"]:
        if not all(
            isinstance(row, list) and len(row) == each["samples"] and all(map(fits, row)) for row in each["rewards"]
        ):
            found = f"expected {each['samples']} numbers or nulls for each prompt"
            raise UserError(f"{no_record}: rewards of {each['name']}: {found}")
    if not is_name(record["method"]):
        raise UserError(f"{no_record}: method: it names a file, and {record['method']!r} is no name of one")
    check_kinds(record["settings"], {"train": dict, "data": dict, "model": dict}, f"{no_record}: settings")
    check_kinds(record["settings"]["train"], {"seed": int, "updates_per_rollout": int}, f"{no_record}: settings.train")
    if record["method"] != BASE and record["seed"] != (seed := record["settings"]["train"]["seed"]):
        raise UserError(f"{no_record}: seed: {record['seed']}, and train.seed of its settings is {seed}")
    return record


def check_kinds(table: Any, kinds: dict[str, type], where: str) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected an object, found {table!r}")
    for key, kind in kinds.items():
        if not isinstance(found := table.get(key), kind) or isinstance(found, bool):
            raise UserError(f"{where}: {key}: expected {kind.__name__}, found {found!r}")


def fits(reward: Any) -> bool:
    return reward is None or (isinstance(reward, int | float) and math.isfinite(reward))


def written(record: Record) -> str:
    """As JSON, a step and a set to a line."""
    lines = []
    for key in KEYS:
        value = record[key]
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f' "{key}": [\n  {rows}\n ]' if value else f' "{key}": []')
        else:
            lines.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
