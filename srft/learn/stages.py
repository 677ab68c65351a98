"""The stages of a run: one after the other they learn with settings of their own, on one model.

    --train.stages sft grpo                    # names of recipes
    [[train.stages]]                           # or tables: settings in place of the run's
    recipe = "sft"                             #   of a recipe, if any
    train = {steps = 100, lr = 1e-5}           #   and its own

Stages that say no number of steps share those of the run evenly. Each has its own warm-up and schedule. Its AdamW
starts anew, or with train.stage_moments = "kept" from the moments of the stage before; the weights go on as they are.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srft.config import Config, TrainConfig
from srft.data import Problem
from srft.errors import UserError
from srft.learn.job import with_steps
from srft.learn.objective import build_objective
from srft.settings import build, check_keys, over, read_recipe
from srft_kernels.objectives import Objective

MAY_SET = ("loss", "rollout", "train")
OF_THE_RUN = ("rollout.engine", "train.stages", "train.seed", "train.optimizer", "train.share_prompts")


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
    """Settings of a stage, before it is known what is trained on. counted: it says itself how many steps it has."""

    name: str
    config: Config
    objective: Objective
    counted: bool = False


def whole(config: Config, problems: list[Problem]) -> list[Stage]:
    """A run of one stage."""
    return stages_of(config, parts_of(config), [problems])


def resolved(config: Config) -> Config:
    """The configuration with the settings of recipes written out, so that another version of srft means the same."""
    tables = [table(entry, f"train.stages[{number}]") for number, entry in enumerate(config.train.stages, 1)]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, stages=tables))


def table(entry: str | dict[str, Any], where: str) -> dict[str, Any]:
    """One of train.stages as a table of sections, and its name; raises UserError for what is none."""
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected the name of a recipe or a table of settings, found {entry!r}")
    own = {key: value for key, value in entry.items() if key not in ("name", "recipe")}
    for key in ("name", "recipe"):
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{where}: {key}: expected text, found {entry[key]!r}")
    try:
        recipe = read_recipe(entry["recipe"]) if "recipe" in entry else {}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if recipe.get("train", {}).pop("stages", None):
        raise UserError(f"{where}: recipe {entry['recipe']!r} has stages itself; name those")
    for key in [*check_keys(own, f"{where}: "), *check_keys(recipe, f"{where}: ")]:
        if key.partition(".")[0] not in MAY_SET or key in OF_THE_RUN:
            raise UserError(f"{where}: {key} is the same in all of a run; a stage sets {', '.join(MAY_SET)}")
    name = entry.get("name") or entry.get("recipe") or own.get("loss", {}).get("preset") or where.rpartition(".")[2]
    return {"name": name, **over(recipe, own)}


def parts_of(config: Config) -> list[Part]:
    """The settings of a run's stages, of which there is one where train.stages names none."""
    parts = []
    for number, entry in enumerate(resolved(config).train.stages, 1):
        name, changes = entry["name"], {key: value for key, value in entry.items() if key != "name"}
        own = changes.get("train", {})
        counted = "steps" in own or "epochs" in own
        plain = dataclasses.asdict(config)
        plain["train"] |= {"stages": [], "epochs": 0.0} if counted else {"stages": []}
        try:
            settings = build(over(plain, changes))
            parts.append(Part(name, settings, build_objective(settings.loss), counted))
        except UserError as error:
            raise UserError(f"train.stages[{number}]: {error}") from error
    return parts or [Part("", config, build_objective(config.loss))]


def steps_of(config: Config, parts: Sequence[Part], prompts: Sequence[int]) -> list[int]:
    """How many of the run's steps each of its parts has. prompts: how many each trains on.

    Raises UserError where a stage would have none.
    """
    said = [with_steps(part.config, count).train.steps for part, count in zip(parts, prompts)]
    shared = [number for number, part in enumerate(parts) if not part.counted]
    if not config.train.steps and not config.train.epochs:  # the run only evaluates
        return [0] * len(parts)
    if config.train.epochs:
        for number in shared:
            part = parts[number].config
            train = dataclasses.replace(part.train, epochs=config.train.epochs / len(shared))
            said[number] = with_steps(dataclasses.replace(part, train=train), prompts[number]).train.steps
    elif shared:
        left = config.train.steps - sum(said[number] for number, part in enumerate(parts) if part.counted)
        if left < len(shared):
            raise UserError(
                f"train.steps {config.train.steps}: {max(left, 0)} steps are left for {len(shared)} of the "
                f"{len(parts)} stages of train.stages; raise it, or give each its train.steps"
            )
        for place, number in enumerate(shared):
            said[number] = left // len(shared) + (place < left % len(shared))
    for number, steps in enumerate(said, 1):
        if not steps:
            raise UserError(f"train.stages[{number}]: train.steps: a stage has one step at least, found 0")
    return said


def stages_of(config: Config, parts: Sequence[Part], problems: Sequence[list[Problem]]) -> list[Stage]:
    """The stages of a run. problems: what each of its parts trains on."""
    stages: list[Stage] = []
    counts = steps_of(config, parts, list(map(len, problems)))
    if all(part.counted for part in parts) and config.train.steps not in (TrainConfig.steps, sum(counts)):
        said = f"each of train.stages has its own, together {sum(counts)}"
        print(f"warning: train.steps {config.train.steps} has no effect: {said}", file=sys.stderr)
    for part, own, steps in zip(parts, problems, counts):
        train = dataclasses.replace(part.config.train, steps=steps, epochs=0.0)
        settings, before = dataclasses.replace(part.config, train=train), stages[-1].last if stages else 0
        stages.append(Stage(part.name, settings, part.objective, own, len(stages) + 1, before))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of a step of the run, from 1; of 0 the first."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])
