"""Do objective, data and settings fit? Asked before weights are loaded: else a run would go on, and to nothing."""

import dataclasses
import math
import sys
from collections.abc import Sequence

from srft.config import Config, TrainConfig
from srft.data import Example, Problem, Prompter, fit
from srft.errors import UserError
from srft.model import POSITIONS
from srft_kernels.objectives import Objective


def check(objective: Objective, config: Config, examples: Sequence[Example]) -> None:
    """Raise UserError for a job that cannot learn what it is meant to; warn where only part of the data can."""
    if not examples:
        return
    check_demonstrations(objective, config, examples)
    if "rollouts" not in objective.learns_from:
        return
    rollout, who = config.rollout, f"loss.preset {config.loss.preset!r}"
    if rollout.top_p < 1:
        raise UserError(
            f"rollout.top_p {rollout.top_p}: {who} needs the log-probs that rollouts were sampled "
            "with, and its own are over the whole vocabulary: take rollout.top_p 1 (eval.top_p may be anything)"
        )
    if rollout.per_prompt == 1 and "demonstrations" not in objective.learns_from:  # else the group has one too
        raise UserError(
            f"rollout.per_prompt 1: {who} compares the rollouts of a prompt with each other, and one "
            "alone has an advantage of 0, so that nothing would be learned: take 2 at least"
        )


def check_demonstrations(objective: Objective, config: Config, examples: Sequence[Example]) -> None:
    without = sum(each.demonstration is None for each in examples)
    if config.train.demo_share and not without:
        print("warning: train.demo_share has no effect: every example has a demonstration", file=sys.stderr)
    if "demonstrations" not in objective.learns_from or not without:
        return
    where = config.data.train_file or "data.tasks"
    learns = f"{where}: loss.preset {config.loss.preset!r} learns from demonstrations"
    if without == len(examples) and not config.data.demonstrations:
        raise UserError(f"data.demonstrations 0: loss.preset {config.loss.preset!r} learns from demonstrations")
    if without == len(examples):
        found = ", ".join(sorted({name for each in examples for name in each.columns})) or "none"
        raise UserError(
            f"{learns}, and none of {len(examples)} examples has one (other columns: {found}); name the column of the "
            "solutions with data.columns, or take a preset that learns from rollouts alone, such as grpo"
        )
    left_out = "" if "rollouts" in objective.learns_from else ", which are left out"
    print(f"warning: {learns}, and {without} of {len(examples)} examples have none{left_out}", file=sys.stderr)
    per_step = (len(examples) - without) / len(examples) * config.train.prompts_per_step
    places = round(config.train.demo_share * config.train.prompts_per_step)
    if not left_out and places > len(examples) - without:
        found = f"train.demo_share {config.train.demo_share:g}: there are {len(examples) - without} demonstrations"
        print(f"warning: {found}, so that each step has some more than once", file=sys.stderr)
    if not left_out and not config.train.demo_share and per_step < 1:
        found = f"one in {1 / per_step:.0f} steps has a demonstration"
        print(f"warning: {found}; train.demo_share gives each step its share", file=sys.stderr)


def training_problems(
    config: Config, prompter: Prompter, examples: list[Example], objective: Objective, positions: float
) -> list[Problem]:
    """All examples as token ids: what is too long is found before any time is spent, whatever the steps.

    Without a demonstration there is nothing to learn from where no rollouts are: such examples are left out.
    """
    demonstrations, rollouts = (kind in objective.learns_from for kind in ("demonstrations", "rollouts"))
    examples = examples if rollouts else with_demonstrations(examples)
    most = {"train.token_budget": config.train.token_budget, POSITIONS: positions}
    problems = fit(prompter, examples, config.data, demonstrations, most, config.rollout.max_new_tokens * rollouts)
    if problems and not rollouts and not any(each.demonstration for each in problems):
        raise UserError(f"loss.preset {config.loss.preset!r} learns from demonstrations, but no example has one")
    return problems


def with_demonstrations(examples: list[Example]) -> list[Example]:
    """Those that have one; all of them where none has, for others to refuse."""
    return [each for each in examples if each.demonstration is not None] or examples


def check_amounts(config: Config, prompts: int, where: str = "") -> None:
    """Warn of amounts that are hardly meant: of a configuration with its steps, and so many prompts to train on.

    where: what warnings begin with.
    """
    train = config.train
    if train.steps and train.warmup_steps > max(train.steps, TrainConfig.warmup_steps):
        found = f"train.warmup_steps {train.warmup_steps}: there are {train.steps} steps"
        print(f"warning: {where}{found}, so that the learning rate never comes to train.lr", file=sys.stderr)
    if train.steps and train.prompts_per_step > prompts:
        found = f"train.prompts_per_step {train.prompts_per_step}: there are {prompts} prompts"
        print(f"warning: {where}{found}, so that each step has some more than once", file=sys.stderr)


def with_steps(config: Config, prompts: int) -> Config:
    """train.epochs as train.steps, the last step filled up from the next epoch."""
    if not config.train.epochs:
        return config
    steps = math.ceil(config.train.epochs * prompts / config.train.prompts_per_step)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, epochs=0.0))
