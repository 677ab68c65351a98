"""Rewards that can be verified: a task's own scorer, math-verify, exact match, or a function of the user.

    scorer = build_reward(config.reward, config.data)
    scorer(examples, completions)                        # [1.0, 0.0, None, …], None: not scored

A user's function has the signature `f(prompts, completions, **columns) -> list[float | None]`: lists of one length, one
entry per completion; `columns` holds answer, demonstration, task and every further column of the data. A function
without `**columns` gets those that it names.
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from numbers import Real
from pathlib import Path
from typing import Any

from srft.config import DataConfig, RewardConfig
from srft.data import Example
from srft.data.tasks import make
from srft.errors import UserError, missing, nearest

RewardFunction = Callable[..., list[float | None]]
SIGNATURE = "def reward(prompts, completions, **columns) -> list[float | None]"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Scorer:
    """Calls a reward function on whole lists and checks what comes back.

    columns: the columns that it takes by name; None: all there are.   needs_answer: it compares with `answer`.
    """

    name: str
    function: RewardFunction
    columns: frozenset[str] | None = None
    needs_answer: bool = False

    def __call__(self, examples: list[Example], completions: list[str]) -> list[float | None]:
        """One finite reward, or None (not scored), per completion; raises UserError naming a function that fails."""
        if not completions:
            return []
        where = f"reward.name {self.name!r}"
        columns = columns_of(examples)
        if self.columns is not None:
            columns = {name: column for name, column in columns.items() if name in self.columns}
        try:
            rewards = self.function([each.prompt for each in examples], list(completions), **columns)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{where}: the function raised {type(error).__name__}: {error} (--debug shows where)"
            ) from error
        if isinstance(rewards, (str, dict)) or not hasattr(rewards, "__len__"):
            raise UserError(
                f"{where}: returned {type(rewards).__name__}, expected a list with one reward per completion"
            )
        if len(rewards) != len(completions):
            found = f"returned {len(rewards)} rewards for {len(completions)} completions"
            raise UserError(f"{where}: {found}; return one number, or None, per completion")
        return [self.check(reward, index) for index, reward in enumerate(rewards)]

    def check(self, reward: Any, index: int) -> float | None:
        if reward is None:
            return None
        value = reward.item() if hasattr(reward, "item") else reward  # numpy and torch scalars
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(
                f"reward.name {self.name!r}: reward {index} is {reward!r}, expected a finite number or None"
            )
        return float(value)


def build_reward(config: RewardConfig, data: DataConfig) -> Scorer:
    """The scorer that `reward.name` names; raises UserError for an unknown name or a module that cannot be imported."""
    name = config.name
    if name == "auto":
        name = "math_verify" if data.train_file else "reasoning_gym"
    if name == "reasoning_gym" and data.train_file:
        raise UserError("reward.name: 'reasoning_gym' scores generated tasks, not data.train_file; take auto or exact")
    if ":" in name:
        function = import_function(name)
        return Scorer(name, function, columns_named(name, function))
    makers: dict[str, Callable[[], RewardFunction]] = {
        "exact": lambda: exact,
        "math_verify": math_verify_reward,
        "reasoning_gym": lambda: task_reward(data.task_args),
    }
    if name not in makers:
        known = f"auto, {', '.join(makers)} or package.module:function"
        raise UserError(f"reward.name: expected {known}, found {name!r}{nearest(name, ['auto', *makers])}")
    return Scorer(name, makers[name](), needs_answer=name != "reasoning_gym")


def check_answers(scorer: Scorer, data: DataConfig, held_out: list[Example], train: list[Example] = ()) -> None:
    """Raise UserError where a reward compares with answers and no example has one; warn where some have none."""
    sides = [(data.train_file, train), (data.eval_file or data.train_file, held_out)]
    for file, examples in sides:
        without = sum(each.answer is None for each in examples)
        if not scorer.needs_answer or not without:
            continue
        where = f"{file or 'data.tasks'}: reward.name {scorer.name!r} compares with the column 'answer'"
        if without == len(examples):
            found = sorted({name for each in examples for name in each.columns})
            found += ["demonstration"] * any(each.demonstration is not None for each in examples)
            raise UserError(
                f"{where}, which no row has; found besides the prompt: {', '.join(found) or 'no column'}"
                f"{nearest('answer', found)} (rename it, or take another reward.name)"
            )
        missed = f"{without} of {len(examples)} rows drawn lack it and are not scored"
        print(f"warning: {where}; {missed}", file=sys.stderr)


def columns_of(examples: list[Example]) -> dict[str, list[Any]]:
    """What a reward function gets by name: one list per column, None where an example has no such column."""
    names = {name for each in examples for name in each.columns} - {"prompts", "completions"}
    columns = {name: [each.columns.get(name) for each in examples] for name in sorted(names)}
    own = {name: [getattr(each, name) for each in examples] for name in ("answer", "demonstration", "task")}
    return columns | own


def import_function(name: str) -> RewardFunction:
    """`package.module:function`, looked for in the current directory too."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"reward.name: expected package.module:function, found {name!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there by itself
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        found = f"importing {module_name!r} raised {type(error).__name__}: {error}"
        raise UserError(
            f"reward.name {name!r}: {found}; it is looked for in {here} and among installed packages"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        there = hasattr(module, function_name)
        found = f", it is of type {type(function).__name__}" if there else nearest(function_name, known)
        raise UserError(f"reward.name {name!r}: {module_name} has no function {function_name!r}{found}")
    return function


def columns_named(name: str, function: RewardFunction) -> frozenset[str] | None:
    """The columns that a user's function names, None if it takes all; UserError if it takes no prompts, completions."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may not tell
        return None
    parameters = list(signature.parameters.values())
    names = [each.name for each in parameters]
    try:
        signature.bind_partial([], [])
        misplaced = any(each in names and names.index(each) != at for at, each in enumerate(("prompts", "completions")))
    except TypeError:
        misplaced = True
    by_name = [each for each in parameters[2:] if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    unnamed = [each for each in parameters[2:] if each.kind is each.POSITIONAL_ONLY and each.default is each.empty]
    if misplaced or unnamed:
        raise UserError(f"reward.name {name!r}: expected {SIGNATURE}, found the signature {signature}")
    return None if any(each.kind is each.VAR_KEYWORD for each in parameters) else frozenset(p.name for p in by_name)


def number(text: str | None) -> Decimal | None:
    """The number that `text` is, thousands separated by commas or not; None when it is none."""
    try:
        return Decimal(text.strip().replace(",", "")) if text else None
    except InvalidOperation:
        return None


def final_answer(completion: str, numeric: bool = False) -> str:
    """What stands after the last "####", or in the last \\boxed{…}, else the whole text; stripped.

    numeric: of that, the first number after the mark, or without a mark the last number of the text ("" if none).
    """
    _, mark, tail = completion.rpartition("####")
    if not mark and (boxed := completion.rpartition("\\boxed{")[1:])[0]:
        mark, tail = boxed[0], inside_braces(boxed[1])
    if not numeric:
        return tail.strip()
    numbers = NUMBER.findall(tail)
    return numbers[0 if mark else -1] if numbers else ""


def inside_braces(text: str) -> str:
    """`text` up to the brace that closes the one before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text


def same(completion: str, answer: str) -> bool:
    """The completion's answer is `answer`, as a number where that is one, else as text regardless of space and case."""
    wanted = number(final_answer(answer))  # a reference solution may carry its own "####"
    if wanted is not None:
        return number(final_answer(completion, numeric=True)) == wanted
    given, wanted = (" ".join(final_answer(text).split()).casefold().rstrip(".") for text in (completion, answer))
    return given == wanted


def exact(prompts: list, completions: list[str], answer: list[str | None], **_: list) -> list[float | None]:
    """1 where the completion's answer equals the reference, else 0; None without a reference."""
    return [None if key is None else float(same(text, key)) for text, key in zip(completions, answer)]


def math_verify_reward() -> RewardFunction:
    """`exact`, or equal as mathematics (fractions, roots, sets, LaTeX) by math-verify."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise missing("math-verify", "reward.name 'math_verify'") from error

    def equal(completion: str, answer: str) -> bool:
        gold, given = final_answer(answer), final_answer(completion)
        # Its extractors look for $…$ around LaTeX; a bare formula is tried both ways.
        return any(verify(parse(f"${gold}$"), parse(text)) for text in (f"${given}$", completion))

    def reward(prompts: list, completions: list[str], answer: list[str | None], **_: list) -> list[float | None]:
        return [
            None if key is None else float(same(text, key) or equal(text, key))
            for text, key in zip(completions, answer)
        ]

    return reward


def task_reward(task_args: dict[str, Any]) -> RewardFunction:
    """The scorers of reasoning-gym, each for the examples that its task made.

    Where the answer is a number a completion is right (1) or wrong (0): the scorers there give part of the reward to a
    wrong number that contains the right digits.
    """
    scorers: dict[str, Any] = {}

    def one(question: Any, completion: str, answer: str | None, task: str, metadata: Any) -> float:
        if task not in scorers:
            scorers[task] = make(task, task_args, seed=0, size=1)
        numeric = number(answer) is not None
        given = final_answer(completion, numeric)
        if numeric and number(given) == number(answer):
            return 1.0
        score = float(scorers[task].score_answer(given, {"question": question, "answer": answer, "metadata": metadata}))
        return float(score >= 1) if numeric else score

    def reward(
        prompts: list, completions: list[str], answer: list, task: list[str], metadata: list, **_: list
    ) -> list[float | None]:
        return [one(*row) for row in zip(prompts, completions, answer, task, metadata)]

    return reward
