"""The texts that all models read: demonstrations, and completions that each model writes of the same prompts."""

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from srft.analysis.models import DEMONSTRATIONS
from srft.config import Config
from srft.data import Problem, Prompter
from srft.intervals import Interval, interval_of
from srft.learn.credit import Group, advantages_of, scored, sequences_of
from srft.learn.packing import Sequence
from srft.metrics import mean
from srft.rewards import Scorer
from srft.rollout import Engine

TASK = "task"  # the set of the run's own prompts


@dataclass(frozen=True)
class Set:
    """Prompts that are analysed. scorer: None where nothing can be verified."""

    name: str
    problems: list[Problem]
    scorer: Scorer | None


@dataclass(frozen=True)
class Text:
    """A completion of a prompt. writer: the name of a model, or `demonstrations`."""

    set: str
    writer: str
    problem: Problem
    tokens: list[int]
    reward: float | None

    @property
    def sequence(self) -> Sequence:
        return Sequence(self.problem.prompt, self.tokens, self.writer == DEMONSTRATIONS)


@dataclass(frozen=True)
class Written:
    """What a model wrote of a set: its completions of each prompt with their rewards."""

    groups: list[Group]

    @property
    def rewards(self) -> list[float]:
        """Means of the prompts, those without a scored completion left out."""
        each = [[reward for reward in group.rewards if reward is not None] for group in self.groups]
        return [mean(rewards) for rewards in each if rewards]

    @property
    def reward(self) -> float:
        return mean(self.rewards)

    @property
    def interval(self) -> Interval:
        return interval_of(self.rewards)


def write(engine: Engine, each: Set, prompter: Prompter, config: Config) -> Written:
    """config.analyze.samples completions of each prompt, as config.eval samples them."""
    rollouts = engine.generate(
        [problem.prompt for problem in each.problems],
        config.analyze.samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
    )
    engine.release()
    if each.scorer is None:
        groups = [Group(problem, own, [None] * len(own), None) for problem, own in zip(each.problems, rollouts)]
        return Written(groups)
    return Written(scored(each.scorer, prompter, each.problems, rollouts))


def learnable(written: Written, config: Config) -> list[Sequence]:
    """What SRFT would learn from: rollouts with their advantages, and demonstrations."""
    loss = dataclasses.replace(config.loss, advantage_std=True)
    return [s for group in written.groups for s in sequences_of(group, advantages_of(group, loss))]


def texts_of(sets: SequenceOf[Set], written: dict[tuple[str, str], Written], most: int) -> list[Text]:
    """Each prompt's demonstration, and the first completion of each model, of each the first so many tokens.

    written: by model and set.
    """
    found = []
    for each in sets:
        found += [
            Text(each.name, DEMONSTRATIONS, problem, problem.demonstration[:most], None)
            for problem in each.problems
            if problem.demonstration
        ]
        for (model, of_set), own in written.items():
            if of_set == each.name:
                found += [
                    Text(of_set, model, group.problem, group.rollouts[0].tokens[:most], group.rewards[0])
                    for group in own.groups
                ]
    return found


@dataclass(frozen=True)
class Places:
    """Where each of the N tokens of the texts stands, each (N,)."""

    text: np.ndarray  # the number of its text
    position: np.ndarray  # within it, from 0
    set: np.ndarray
    writer: np.ndarray


def places_of(texts: SequenceOf[Text]) -> Places:
    lengths = [len(text.tokens) for text in texts]
    return Places(
        np.repeat(np.arange(len(texts)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat([text.set for text in texts], lengths),
        np.repeat([text.writer for text in texts], lengths),
    )
