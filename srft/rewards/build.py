"""From `reward.name` to a scorer, and whether the data has what its rewards need.

scorer = build_reward(config.reward, config.data)
check_answers(scorer, config.data, held_out, train)             # before a model is loaded
"""

import sys
from collections.abc import Callable
from typing import Any

from srft.config import DataConfig, RewardConfig
from srft.data import Example
from srft.data.tasks import SYSTEM_PROMPT
from srft.errors import UserError, nearest
from srft.rewards.answers import MarkRule, is_answer
from srft.rewards.builtin import Exact, MathVerify, TaskReward
from srft.rewards.functions import ASKED_FOR, Function
from srft.rewards.scorer import Scorer


def build_reward(config: RewardConfig, data: DataConfig) -> Scorer:
    """The scorer that `reward.name` names; raises UserError for an unknown name or a module that cannot be imported."""
    names = [config.name] if isinstance(config.name, str) else list(config.name)
    if not names:
        raise UserError("reward.name: expected at least one name, found none")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"reward.name: {twice[0]!r} is there twice; give it a larger weight in reward.weights")
    if config.weights and len(config.weights) != len(names):
        found = f"found {len(config.weights)} for {len(names)} functions"
        raise UserError(f"reward.weights: expected one number per function of reward.name, {found}")
    rewards = [reward_of(name, config, data) for name in names]
    name = ", ".join(each.name for each in rewards)
    return Scorer(name, *rewards, weights=config.weights, seconds=config.timeout, workers=config.workers)


def reward_of(name: str, config: RewardConfig, data: DataConfig) -> Any:
    if name == "auto":
        name = "math_verify" if data.train_file else "reasoning_gym"
    if name == "reasoning_gym" and data.train_file:
        raise UserError("reward.name: 'reasoning_gym' scores generated tasks, not data.train_file; take auto or exact")
    if ":" in name:
        return Function(name, conversational=config.conversational)
    # As data/prompts.py has it: generated tasks ask for ####, files for nothing.
    told = SYSTEM_PROMPT if data.system_prompt is None and not data.train_file else data.system_prompt
    rule = MarkRule(config.mark, told)
    makers: dict[str, Callable[[], Any]] = {
        "exact": lambda: Exact(rule),
        "math_verify": lambda: MathVerify(rule),
        "reasoning_gym": lambda: TaskReward(data.task_args, rule),
    }
    if name not in makers:
        known = f"auto, {', '.join(makers)}, package.module:function or file.py:function"
        raise UserError(f"reward.name: expected {known}, found {name!r}{nearest(name, ['auto', *makers])}")
    return makers[name]()


def check_answers(scorer: Scorer, data: DataConfig, held_out: list[Example], train: list[Example] = ()) -> None:
    """Raise UserError where no example has a column that a reward cannot do without; warn of rows without an answer."""
    for file, examples in [(data.train_file, train), (data.eval_file or data.train_file, held_out)]:
        for reward in scorer.rewards if examples else ():
            where = f"{file or 'data.tasks'}: reward.name {reward.name!r}"
            if reward.needs_answer:
                check_references(where, examples)
            else:
                check_columns(where, reward, examples)


def check_references(where: str, examples: list[Example]) -> None:
    without = sum(not is_answer(each.answer) for each in examples)
    where += " compares with the column 'answer'"
    if without == len(examples):
        found = found_in(examples)
        advice = "rename it, or take another reward.name"
        if found == ["demonstration"]:
            advice = "take another reward.name, or learn from the demonstrations alone: loss.preset sft"
        raise UserError(
            f"{where}, which no row has; found besides the prompt: {', '.join(found) or 'no column'}"
            f"{nearest('answer', found)} ({advice})"
        )
    if without:
        missed = f"{without} of {len(examples)} rows drawn lack it and are not scored"
        print(f"warning: {where}; {missed}", file=sys.stderr)


def check_columns(where: str, reward: Any, examples: list[Example]) -> None:
    found = found_in(examples)
    answers = any(each.answer is not None for each in examples)
    there = {*found, *ASKED_FOR, "prompts", "completions", "task"} | ({"answer"} if answers else set())
    if missing := sorted(reward.missing(there)):
        raise UserError(
            f"{where} names the column {missing[0]!r}, which no row has; found besides the prompt: "
            f"{', '.join([*found, *['answer'] * answers]) or 'no column'}{nearest(missing[0], there)}"
        )
    taken = [name for name in found if name in {*ASKED_FOR, "prompts", "completions", "task"} and reward.wants(name)]
    if taken:
        raise UserError(f"{where} gets {taken[0]!r} from srft, but the data has such a column too; rename it there")


def found_in(examples: list[Example]) -> list[str]:
    """The columns of a file besides prompt and answer."""
    found = sorted({name for each in examples for name in each.columns})
    return found + ["demonstration"] * any(each.demonstration is not None for each in examples)
