"""Prompts, answers, worked demonstrations and scorers from the generators of reasoning-gym.

`gsm_symbolic` brings worked solutions of its own; for `chain_sum` one is written here; every other task demonstrates
its bare answer. All end in "#### answer", which is what the scorers look for.
"""

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from srft.config import DataConfig
from srft.data.examples import HELD_OUT, Example, Split, prompt_hash
from srft.errors import UserError, missing, nearest

SYSTEM_PROMPT = "Work step by step; answer after ####."
# Tasks of reasoning-gym whose items follow from Python's hash seed, or from where objects lie in memory and numbers
# that are drawn without the task's own generator.
BY_HASH = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
BY_CHANCE = ("codeio", "knight_swap", "list_functions")
DEFAULT_SIZE = 4096  # train prompts, where no size is given


def generate(config: DataConfig, split: Split, count: int = 0) -> list[Example]:
    """At most `count` examples (0: 4096), the tasks in turn, every prompt once; load.py says what is held out."""
    if not config.tasks:
        raise UserError("data.tasks: name at least one task, or give a data.train_file")
    check_names([*config.tasks, *config.task_args])
    check_repeatable(config.tasks)
    count = count or DEFAULT_SIZE
    seed = config.seed if split == "train" else config.eval_seed
    streams = [stream(task, config.task_args, seed, 2 * HELD_OUT * count) for task in dict.fromkeys(config.tasks)]
    wanted = [(each for each in one if (prompt_hash(each) % HELD_OUT == 0) == (split == "eval")) for one in streams]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*wanted))  # a task that runs dry leaves its turns empty
    examples = list(itertools.islice((each for each in turns if each), count))
    if not examples:
        raise UserError(
            f"data.tasks: {', '.join(config.tasks)}: too few distinct prompts for {split}; widen data.task_args"
        )
    return examples


def stream(task: str, task_args: dict[str, Any], seed: int, size: int) -> Iterator[Example]:
    """Distinct examples among the first `size` of one task, until it hardly makes new ones."""
    # The generators seed item i with seed + i: neighbouring seeds would share all items but one, so spread them.
    spread = int.from_bytes(hashlib.sha256(f"{seed} {task}".encode()).digest()[:4], "big") >> 1
    dataset = make(task, task_args, spread, size)
    seen: set[int] = set()
    repeats = 0
    for index in range(size):
        example = to_example(task, dataset[index], index)
        repeats = repeats + 1 if prompt_hash(example) in seen else 0
        if repeats > 200:
            return
        if not repeats:
            seen.add(prompt_hash(example))
            yield example


def check_repeatable(tasks: Iterable[str]) -> None:
    """Raise UserError for a task that another process, a rank or one that resumes, would make in another way."""
    for task in tasks:
        if task in BY_CHANCE:
            raise UserError(f"data.tasks: {task!r} is made in another way each time: no run could go on with it")
        if task in BY_HASH and sys.flags.hash_randomization and not os.environ.get("PYTHONHASHSEED", "").isdecimal():
            found = f"data.tasks: {task!r} is made in another way in each process (it walks through sets)"
            raise UserError(f"{found}; start with PYTHONHASHSEED=0 in the environment")


def check_names(names: Iterable[str]) -> None:
    known = gym().DATASETS
    for name in names:
        if name not in known:
            hint = nearest(name, known, count=2) or "; for example chain_sum, gsm_symbolic, basic_arithmetic"
            raise UserError(f"data.tasks: unknown task {name!r}{hint} ({len(known)} tasks of reasoning-gym are known)")


def gym() -> ModuleType:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise missing("reasoning-gym", "generated tasks") from error
    return reasoning_gym.factory


def make(task: str, task_args: dict[str, Any], seed: int, size: int) -> Any:
    """The generator of `task`; arguments that it does not take or refuses are told with its own words."""
    own = task_args.get(task, {})
    if not isinstance(own, dict):
        raise UserError(f"data.task_args.{task}: expected a table of arguments, found {own!r}")
    known = [each.name for each in dataclasses.fields(gym().DATASETS[task][1]) if each.name not in ("seed", "size")]
    for name in own:
        if name not in known:
            raise UserError(
                f"data.task_args.{task}: unknown argument {name!r}{nearest(name, known)} ({', '.join(known)})"
            )
    try:
        return gym().create_dataset(task, seed=seed, size=size, **own)
    except Exception as error:
        raise UserError(
            f"data.task_args.{task}: the generator refuses {own}: {error or type(error).__name__}"
        ) from error


def to_example(task: str, item: dict[str, Any], index: int) -> Example:
    answer = None if item["answer"] is None else str(item["answer"])
    columns = {"metadata": item["metadata"]}
    return Example(
        [{"role": "user", "content": item["question"]}],
        demonstrate(task, item),
        answer,
        task,
        columns,
        f"{task}[{index}]",
    )


def demonstrate(task: str, item: dict[str, Any]) -> str | None:
    """A worked solution that ends in "#### answer"; None for a task that knows no answer, only how to check one."""
    if item["answer"] is None:
        return None
    if cot := item["metadata"].get("answer_cot"):
        return cot
    return worked_sum(item["metadata"]["expression"]) if task == "chain_sum" else f"#### {item['answer']}"


def worked_sum(expression: str) -> str:
    """Partial sums from left to right: "12 + 5 - 3" → "12 + 5 = 17\\n17 - 3 = 14\\n#### 14"."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2]):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])
