"""Settings that mean nothing, since others make them so: a run begins with a warning of each."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from srft.config import Config
from srft.learn.objective import refers
from srft.learn.stages import Part
from srft.model.adapters import in_directory
from srft.settings import OF_EVALUATION
from srft_kernels.objectives import Objective

OF_ROLLOUTS = (
    *(("rollout", name) for name in ("per_prompt", "temperature", "top_p", "resample")),
    *(("loss", name) for name in ("mask_truncated", "advantage_std", "advantage_eps")),
)
USUAL = Config()


def tell_unused(config: Config, parts: Sequence[Part]) -> None:
    for option, reason in unused(config, parts):
        print(f"warning: {option} has no effect: {reason}", file=sys.stderr)


def unused(config: Config, parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    """Options, and why they mean nothing. parts: those of the run."""
    yield from unused_anywhere(config)
    objectives = [part.objective for part in parts]
    who = "train.stages" if config.train.stages else f"loss.preset {config.loss.preset!r}"
    for section, name, reason in unused_by(objectives, config):
        yield f"{section}.{name}", f"{who} {reason}"
    for part in parts:
        for section, name, reason in unused_by([part.objective], part.config):
            if name in part.own.get(section, {}):
                yield f"train.stages[{part.number}]: {section}.{name}", f"it {reason}"
    if config.train.stages:
        yield from unused_with_stages(config, parts)
    elif is_set(config, "train", "stage_moments"):
        yield "train.stage_moments", "there are no train.stages"


def unused_anywhere(config: Config) -> Iterator[tuple[str, str]]:
    if config.run.keep_checkpoints and not config.run.checkpoint_every:
        yield "run.keep_checkpoints", "without run.checkpoint_every there is the final one alone"
    if config.eval.every and not config.eval.prompts:
        yield "eval.every", "eval.prompts is 0"
    if config.eval.sets:
        yield "eval.sets", "a run is measured on its held-out prompts; srft eval --checkpoint RUN measures the sets"
    if config.train.epochs and is_set(config, "train", "steps"):
        yield "train.steps", f"train.epochs {config.train.epochs:g} says how many there are"
    if (own := in_directory(config.model.path)) or not config.model.lora_rank:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if is_set(config, "model", name):
                yield f"model.{name}", f"the adapters in {own} have theirs" if own else "model.lora_rank is 0"
    if config.data.train_file:
        for name in ("tasks", "task_args"):
            if is_set(config, "data", name):
                yield f"data.{name}", "examples are from data.train_file"
    elif config.data.columns:
        yield "data.columns", "tasks have none; it is for data.train_file"


def unused_by(objectives: Sequence[Objective], config: Config) -> Iterator[tuple[str, str, str]]:
    """What none of the objectives reads: section, name and reason."""
    if not any("rollouts" in objective.learns_from for objective in objectives):
        for section, name in OF_ROLLOUTS:
            if is_set(config, section, name):
                yield section, name, "learns from no rollouts"
    both = any({"demonstrations", "rollouts"} <= {*objective.learns_from} for objective in objectives)
    if is_set(config, "train", "demo_share") and not both:
        yield "train", "demo_share", "does not learn from demonstrations and rollouts at once"
    if config.model.reference and not any(map(refers, objectives)):
        yield "model", "reference", "has no term that keeps near it (loss.options.kl_coef)"
    if config.loss.hpt_threshold and not any(objective.switches for objective in objectives):
        yield "loss", "hpt_threshold", "switches between no losses"


def unused_with_stages(config: Config, parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    own = [{f"{section}.{name}" for section in part.own for name in part.own[section]} for part in parts]
    counts = {"train.steps", "train.epochs"}
    in_each = set.intersection(*own) - counts | (counts if all(part.counted for part in parts) else set())
    for key in sorted(in_each - OF_EVALUATION):
        if is_set(config, *key.split(".")):
            yield key, "each of train.stages has its own"
    if "stage_moments" in parts[0].own.get("train", {}) and is_set(parts[0].config, "train", "stage_moments"):
        yield "train.stages[1]: train.stage_moments", "no stage is before the first"


def is_set(config: Config, section: str, name: str) -> bool:
    """Whether a setting is another than the default."""

    def of(which: Config) -> Any:
        return getattr(getattr(which, section), name)

    return of(config) != of(USUAL)
