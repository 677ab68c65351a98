"""The stages of a run: one after the other they learn with settings of their own, on one model.

    --train.stages sft grpo                    # names of recipes
    [[train.stages]]                           # or tables: settings in place of the run's
    recipe = "sft"                             #   of a recipe, if any
    train = {steps = 100, lr = 1e-5}           #   and its own

Stages that say no number of steps share those of the run evenly. Each has its own warm-up and schedule. Its AdamW
starts anew, or with train.stage_moments = "kept" from the moments of the stage before; the weights go on as they are.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from srft.config import Config
from srft.data import Problem
from srft.errors import UserError
from srft.learn.job import with_steps
from srft.learn.objective import build_objective
from srft.settings import build, over, stage_table
from srft_kernels.objectives import Objective


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    name: of its recipe, or what it was called.   number: from 1.   before: steps of the run that were before it.
    config: the run's, with the stage's settings in it; train.steps are its own.   problems: what it trains on.
    """

    name: str
    config: Config
    objective: Objective
    problems: list[Problem]
    number: int = 1
    before: int = 0

    @property
    def last(self) -> int:
        """Its last step, counted over the run."""
        return self.before + self.config.train.steps

    @property
    def order(self) -> str:
        """The seed of the order of its prompts."""
        seed = str(self.config.train.seed)
        return seed if self.number == 1 else f"{seed}/stage {self.number}"


@dataclass(frozen=True)
class Part:
    """A stage before it is known what is trained on.

    number: of train.stages, from 1; 0 for the whole of a run without any.   own: the settings that it gives.
    counted: it says itself how many steps it has.
    """

    name: str
    config: Config
    objective: Objective
    number: int = 0
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    counted: bool = False


def whole(config: Config, problems: list[Problem]) -> list[Stage]:
    """A run of one stage."""
    return stages_of(config, parts_of(config), [problems])


def parts_of(config: Config) -> list[Part]:
    """The settings of a run's stages, of which there is one where train.stages names none."""
    parts = []
    for number, entry in enumerate(config.train.stages, 1):
        changes = stage_table(entry, number)
        name, own = changes.pop("name"), changes.get("train", {})
        plain = dataclasses.asdict(config)
        plain["train"] |= {"stages": [], "epochs": 0.0}
        with naming(number):
            settings = build(over(plain, changes))
            if "steps" in own and settings.train.epochs:
                raise UserError("train.steps and train.epochs: give one of them")
            counted = "steps" in own or settings.train.epochs > 0
            parts.append(Part(name, settings, build_objective(settings.loss), number, own=changes, counted=counted))
    return parts or [Part("", config, build_objective(config.loss))]


@contextlib.contextmanager
def naming(number: int) -> Iterator[None]:
    """An error about a setting says in which of train.stages it is; number 0: in none."""
    try:
        yield
    except UserError as error:
        raise UserError(f"train.stages[{number}]: {error}" if number else str(error)) from error


def steps_of(config: Config, parts: Sequence[Part], prompts: Sequence[int]) -> list[int]:
    """How many of the run's steps each of its parts has. prompts: how many each trains on.

    Raises UserError where a stage would have none.
    """
    if not config.train.steps and not config.train.epochs:  # the run only evaluates
        return [0] * len(parts)
    said = [with_steps(part.config, count).train.steps for part, count in zip(parts, prompts)]
    shared = [place for place, part in enumerate(parts) if not part.counted]
    left = config.train.steps - sum(said[place] for place, part in enumerate(parts) if part.counted)
    if shared and left < len(shared) and not config.train.epochs:
        raise UserError(
            f"train.steps {config.train.steps} leaves {max(left, 0)} for {len(shared)} of the {len(parts)} stages of "
            "train.stages; raise it, or give each its train.steps"
        )
    for number, place in enumerate(shared):
        said[place] = left // len(shared) + (number < left % len(shared))
        if config.train.epochs:
            train = dataclasses.replace(parts[place].config.train, epochs=config.train.epochs / len(shared))
            part = dataclasses.replace(parts[place].config, train=train)
            said[place] = with_steps(part, prompts[place]).train.steps
    for part, steps in zip(parts, said):
        with naming(part.number):
            if not steps:
                raise UserError("train.steps: a stage has one step at least, found 0")
    return said


def stages_of(config: Config, parts: Sequence[Part], problems: Sequence[list[Problem]]) -> list[Stage]:
    """The stages of a run. problems: what each of its parts trains on."""
    stages: list[Stage] = []
    for part, own, steps in zip(parts, problems, steps_of(config, parts, list(map(len, problems)))):
        train = dataclasses.replace(part.config.train, steps=steps, epochs=0.0)
        settings, before = dataclasses.replace(part.config, train=train), stages[-1].last if stages else 0
        stages.append(Stage(part.name, settings, part.objective, own, len(stages) + 1, before))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of a step of the run, from 1; of 0 the first."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])
