"""What a run that goes on may change, and what would make it another run."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft.config import Config, DataConfig
from srft.data import Example, digest, digest_of_files
from srft.errors import UserError, first_line
from srft.settings import differing, flat

MAY_CHANGE = {
    "model": {"device", "attention", "gradient_checkpointing", "trust_remote_code"},
    "data": {"train_file", "eval_file"},  # `check_data` sees what is in them
    "rollout": {"batch_size"},
    "reward": {"timeout", "workers"},
    "train": {
        *("steps", "epochs", "lr", "warmup_steps", "schedule", "weight_decay", "max_grad_norm"),
        *("token_budget", "share_prompts"),
    },
    "eval": {field.name for field in dataclasses.fields(Config.__dataclass_fields__["eval"].default_factory)},
    "run": {field.name for field in dataclasses.fields(Config.__dataclass_fields__["run"].default_factory)} - {"dir"},
}
DATA = "data.json"  # in a run's directory: which examples it has


def check_settings(before: Config, now: Config) -> None:
    """Raise UserError where a setting of a run differs from what it began with, and may not."""
    bounded = now.data.overlong != "error"  # then it says which rows there are
    free = {f"{section}.{name}" for section, names in MAY_CHANGE.items() for name in names}
    free -= {"train.token_budget"} if bounded else set()
    found = differing(*(flat(dataclasses.asdict(config)) for config in (before, now)))
    if changed := {key: values for key, values in found.items() if key not in free}:
        said = "; ".join(f"{key} was {shortened(old)}, is {shortened(new)}" for key, (old, new) in changed.items())
        may = ", ".join(f"train.{name}" for name in sorted(MAY_CHANGE["train"]))
        raise UserError(
            f"--resume: that would be another run: {said}. What may change: {may}, eval.*, run.* but run.dir, and "
            "where and how fast it runs; a new run starts from a checkpoint with --model.path"
        )


def shortened(value: Any, length: int = 120) -> str:
    return text if len(text := repr(value)) <= length else f"{text[:length]}…"


def check_stages(checkpoint: Path, before: Sequence[int], now: Sequence[int], done: int) -> None:
    """Raise UserError where steps that are done would be those of another stage. before, now: steps of each stage."""
    if done > sum(now):
        raise UserError(f"--resume {checkpoint}: {done} steps are done; train.steps {sum(now)} is fewer")
    ends, other_ends = (set(itertools.accumulate(each)) for each in (before, now))
    if any(step < done for step in ends ^ other_ends):
        stages = " + ".join(map(str, before)), " + ".join(map(str, now))
        raise UserError(
            f"--resume {checkpoint}: the run has stages of {stages[0]} steps, of which {done} are done; now they would "
            f"have {stages[1]}, and it would be another run: leave train.steps and train.epochs as they were; a new "
            "run starts from a checkpoint with --model.path"
        )


def fingerprint(train: Sequence[Example], held_out: Sequence[Example], config: DataConfig) -> dict[str, Any]:
    """What tells whether data are still those of a run; and of its files, whether those of another run are the same."""

    def of(examples: Sequence[Example]) -> dict[str, Any]:
        lie_anywhere = [dataclasses.asdict(dataclasses.replace(each, source="")) for each in examples]
        for each in lie_anywhere:
            if each["choices"] is None:
                del each["choices"]  # runs of older versions knew none
        return {"examples": len(examples), "sha256": digest(lie_anywhere)}

    return {"train": of(train), "held_out": of(held_out), "files": digest_of_files(config)}


def check_data(directory: Path, config: DataConfig, now: dict[str, Any]) -> None:
    """Raise UserError where the training data of a run are no longer those that it began with. They may lie elsewhere.

    config: of the run as it began.
    """
    try:
        before = json.loads((directory / DATA).read_text(encoding="utf-8"))
        count = before["train"]["examples"]
    except FileNotFoundError:  # a run of an older version
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"it does not tell the run's examples ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{directory / DATA}: {found}; --resume needs it as the run wrote it") from error
    if before["train"] != now["train"]:
        counts = [f"{each} examples" for each in (count, now["train"]["examples"])]
        others = ", others (rows, their order, or the file's name, which rewards get as the task)"
        where, advice = f" (data.train_file {config.train_file!r})", "put back the files as they were"
        if not config.train_file:
            others, where, advice = ", others", "", "take a task of data.tasks that makes the same each time"
        raise UserError(
            f"--resume: the training data have changed: the run began with {counts[0]}{where}, now there are "
            f"{counts[1]}{others * (counts[0] == counts[1])}; {advice}, or start a new run from a checkpoint with "
            "--model.path"
        )
