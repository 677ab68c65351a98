"""The order of prompts: which are drawn in each step of a stage."""

import random

from srft.data import Problem
from srft.learn.stages import Stage


def drawn(stage: Stage, number: int) -> list[Problem]:
    """The prompts of step `number` of the run: every one once, then all again in another order, anew in each stage.

    With train.demo_share so many of each step are of those that have a demonstration, and both kinds have an order of
    their own. It follows from train.seed and the data alone: a run of more steps begins as one of fewer.
    """
    train, number = stage.config.train, number - stage.before
    size, share = train.prompts_per_step, train.demo_share
    shown = [problem for problem in stage.problems if problem.demonstration] if share else []
    if len(shown) in (0, len(stage.problems)):
        return in_turn(stage.problems, stage.order, number, size)
    others = [problem for problem in stage.problems if not problem.demonstration]
    count = max(1, min(round(share * size), size if share == 1 else size - 1))
    return [
        *in_turn(shown, f"{stage.order}/demonstrations", number, count),
        *in_turn(others, stage.order, number, size - count),
    ]


def in_turn(pool: list[Problem], seed: str, number: int, count: int) -> list[Problem]:
    """Those of step `number`, from 1, where each step has `count`."""
    chosen: list[Problem] = []
    for position in range((number - 1) * count, number * count):
        epoch, index = divmod(position, len(pool))
        if not chosen or not index:
            order = random.Random(f"{seed}/{epoch}").sample(range(len(pool)), len(pool))
        chosen.append(pool[order[index]])
    return chosen
