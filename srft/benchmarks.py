"""Benchmark sets from files, as eval.sets names them.

    [[eval.sets]]
    file = "aime24.jsonl"       # whatever data.train_file may be; columns as data/columns.py knows them
    name = "AIME 24"            # of its row; default: that of the file
    group = "maths"             # sets of one group have a mean; default: how they are graded
    samples = 32                # default: eval.samples
    temperature = 0.6           # default: eval.temperature; 0: greedy
    prompts = 10                # the first so many; default: eval.set_prompts
    columns = {answer = "key"}  # as data.columns
    broken = "drop"             # leaves out rows that cannot be read, graded or fit; default: "error"

    [[eval.sets]]
    task = "basic_arithmetic"   # or one that reasoning-gym makes; these prompts are held out in every run
    task_args = {max_terms = 3}  # as in data.task_args
    prompts = 64                # default: eval.set_prompts, else eval.prompts

Each prompt of a file counts, also one that is there twice.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.data import Example, load_examples, read_examples, rows_of
from srft.errors import UserError, check_known
from srft.rewards import is_answer

KEYS: dict[str, tuple[Any, str]] = {
    "file": ((str, list), "the name of a file, or several"),
    "name": (str, "text"),
    "group": (str, "text"),
    "samples": (int, "a whole number of 1 at least"),
    "temperature": ((int, float), "a number of 0 at least"),
    "prompts": (int, "a whole number of 1 at least"),
    "columns": (dict, "a table"),
    "broken": (str, "error or drop"),
    "task": (str, "the name of a task"),
    "task_args": (dict, "a table"),
}
OF_FILES, OF_TASKS = ("columns", "broken"), ("task_args",)


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    rows: how many there are, those that are left out included.   drops: a row that does not fit is left out too.
    temperature: None for eval.temperature.
    task_args: of the task that made it, whose scorer grades it; None of a file.
    """

    name: str
    group: str
    samples: int
    examples: list[Example]
    rows: int
    drops: bool = False
    temperature: float | None = None
    task_args: dict[str, Any] | None = None

    @property
    def count(self) -> str:
        return f"{len(self.examples)} prompts × {self.samples} samples"


def load_sets(config: Config, option: str = "eval.sets") -> list[Benchmark]:
    """What eval.sets names; raises UserError for what is wrong in it, and with file and line for a broken row.

    option: what messages call it.
    """
    sets = [load_set(entry, f"{option}[{place}]", config) for place, entry in enumerate(config.eval.sets, 1)]
    names = [each.name for each in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option}: two sets are called {twice[0]!r}; give one of them another name")
    return sets


def load_set(entry: str | dict[str, Any], where: str, config: Config) -> Benchmark:
    entry = {"file": entry} if isinstance(entry, str) else dict(entry)
    check_set(entry, where)
    if "task" in entry:
        return made_set(entry, where, config)
    drops = entry.get("broken") == "drop"
    broken = "drop" if drops else "error"
    data = dataclasses.replace(config.data, columns=entry.get("columns", {}), turns="last", broken=broken)
    try:
        examples = [row[-1] for row in read_examples(entry["file"], data, where.partition("[")[0])]
        rows = sum(1 for _ in rows_of(entry["file"], where.partition("[")[0])) if drops else len(examples)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_files(examples, where)
    if unknown := [each for each in examples if not is_answer(each.answer)]:
        others = ", ".join(unknown[0].columns) or "none"
        found = f"no answer is known, so nothing can be graded (other columns: {others})"
        advice = 'name the column that has it: columns = {answer = …}, or leave such rows out: broken = "drop"'
        message = f"{where}: {unknown[0].source}: {found}; {advice}"
        if not drops or len(unknown) == len(examples):
            raise UserError(message)
        print(f"warning: {len(unknown)} of {rows} rows are left out; {message}", file=sys.stderr)
        examples = [each for each in examples if is_answer(each.answer)]
    if most := entry.get("prompts") or config.eval.set_prompts:
        examples = examples[:most]
        rows = len(examples)
    group = entry.get("group") or ("letter" if all(each.choices for each in examples) else "math-verify")
    name = entry.get("name") or examples[0].task
    samples, temperature = entry.get("samples", config.eval.samples), entry.get("temperature")
    return Benchmark(name, group, samples, examples, rows, drops, temperature)


def made_set(entry: dict[str, Any], where: str, config: Config) -> Benchmark:
    """A set that a task of reasoning-gym makes: of the side of its prompts that no run is trained on."""
    task, count = entry["task"], entry.get("prompts") or config.eval.set_prompts or config.eval.prompts
    task_args = config.data.task_args | ({task: entry["task_args"]} if "task_args" in entry else {})
    data = dataclasses.replace(config.data, train_file=None, eval_file=None, tasks=[task], task_args=task_args)
    try:
        examples = load_examples(data, "eval", count)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    group, samples = entry.get("group", "reasoning-gym"), entry.get("samples", config.eval.samples)
    name, temperature = entry.get("name", task), entry.get("temperature")
    return Benchmark(name, group, samples, examples, len(examples), temperature=temperature, task_args=task_args)


def check_set(entry: dict[str, Any], where: str) -> None:
    check_known(entry, KEYS, where)
    for key, value in entry.items():
        kind, expected = KEYS[key]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if fits and isinstance(value, (int, float)):
            fits = value >= (1 if kind is int else 0) and math.isfinite(value)
        if key == "file" and isinstance(value, list):
            fits = all(isinstance(each, str) and each.strip() for each in value)
        if not fits or (key == "broken" and value not in ("error", "drop")):
            raise UserError(f"{where}: {key}: expected {expected}, found {value!r}")
    if "task" in entry and "file" in entry:
        raise UserError(f"{where}: a set is of a file or of a task, found both")
    for key in OF_FILES if "task" in entry else OF_TASKS:
        if key in entry:
            raise UserError(f"{where}: {key}: a set of a {'task' if 'task' in entry else 'file'} has none")
    source = "task" if "task" in entry else "file"
    if not entry.get(source) or not str(entry[source]).strip():
        raise UserError(f"{where}: {source}: a value is needed")


def check_files(examples: list[Example], where: str) -> None:
    """Raise UserError where a glob has met a set in two formats: each of its problems would count twice."""
    files = {each.source.rpartition(":")[0] for each in examples}
    stems: dict[str, str] = {}
    for file in sorted(files):
        other = stems.setdefault(Path(file).name.partition(".")[0], file)
        if other != file:
            raise UserError(f"{where}: {other} and {file} are both meant; name one of them")
