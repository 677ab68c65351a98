"""The steps of a run as they are watched: a bar, the stages as they begin, and the end of a run that learns nothing."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from srft.config import Config
from srft.errors import UserError
from srft.learn.stages import Stage, stage_at
from srft.trainer import Trainer


def steps_with_bar(
    trainer: Trainer, config: Config, done: int = 0
) -> Iterator[tuple[int, dict[str, float], list[dict[str, Any]]]]:
    """Do the steps after `done` and show the bar; yields how many steps are done, and what the trainer tells of each.

    UserError where no update can be taken.
    """
    steps = config.train.steps
    skipped, idle, patience = 0, 0, min(5, steps)
    with tqdm(total=steps, initial=done, unit="step", **width(), disable=not steps) as bar:
        for number in range(done + 1, steps + 1):
            stage = stage_at(trainer.stages, number)
            if len(trainer.stages) > 1 and number in (done + 1, stage.before + 1):
                tqdm.write(beginning(stage, len(trainer.stages)))
            metrics, samples = trainer.step(number)
            shown = {"reward": "reward_mean", "entropy": "rollout_entropy", "loss": "loss"}
            known = {name: metrics.get(key, math.nan) for name, key in shown.items()}
            words = [f"{name} {value:.3f}" for name, value in known.items() if math.isfinite(value)]
            bar.set_postfix_str(", ".join([*words, f"{metrics['tokens_per_second']:.0f} tokens/s"]), refresh=False)
            bar.update()
            yield number, metrics, samples
            idle = 0 if metrics["demo_tokens"] + metrics["rollout_tokens"] else idle + 1
            if idle == patience:
                tqdm.write(
                    f"warning: in {idle} steps in a row there was nothing to learn from: no token is in the loss "
                    "(rollout.resample, loss.mask_truncated and rewards of None leave rollouts out)"
                )
            skipped = skipped + 1 if metrics["skipped_updates"] == 1 else 0
            if skipped == patience:
                wider = "" if trainer.loaded.dtype == torch.float32 else ", or take model.dtype float32"
                raise UserError(
                    f"training diverged: in {skipped} steps in a row no gradient was finite, so no update was taken; "
                    f"lower train.lr{wider}"
                )


def beginning(stage: Stage, stages: int) -> str:
    """What is said when a stage begins, or goes on in a resumed run."""
    first, config = stage.before + 1, stage.config.train
    adamw = f", AdamW's moments {config.stage_moments}" if stage.number > 1 else ""
    return f"stage {stage.number} of {stages}: {stage.name}, steps {first} to {stage.last}{adamw}"


def width() -> dict[str, Any]:
    """Of the bar: that of the terminal. One that does not know its own says 0, at which tqdm would show nothing."""
    with contextlib.suppress(OSError, ValueError):  # it is no terminal
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 100}
    return {"dynamic_ncols": True}
