"""Where metrics go besides the run's files: Weights & Biases, trackio, TensorBoard; each optional, by the same names.

trackers = open_trackers(config.run, directory, done=0)
trackers[0].log({"loss": 0.5, "reward_mean": 0.25}, step=1)
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from srft.config import RunConfig
from srft.errors import UserError, first_line, missing

PROJECT = "srft"  # WANDB_PROJECT and the like are for who wants another


class Tracker:
    """W&B, or trackio, which has the same three functions. A resumed run is a new one there, of the same group."""

    def __init__(self, name: str, directory: Path, settings: dict[str, Any], done: int = 0):
        if name == "wandb":
            os.environ.setdefault("WANDB_DIR", str(directory))  # not wherever the run was started
        self.name, self.module = name, importlib.import_module(name)
        title = f"{directory.name} from step {done}" if done else directory.name
        try:
            self.module.init(project=PROJECT, name=title, group=directory.name, config=settings)
        except Exception as error:  # no account, no network, no server
            advice = "WANDB_MODE=offline needs none of them; " if name == "wandb" else ""
            found = f"{name} could not be started: {first_line(error)}"
            raise UserError(f"run.tracker {name!r}: {found}; {advice}run.tracker none does without it") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by flat names, as in metrics.jsonl; of a step that is not before the last one."""
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


class Board(Tracker):
    """TensorBoard, in the run's directory. What a run that was stopped wrote after step `done` is hidden there."""

    name = "tensorboard"

    def __init__(self, directory: Path, done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(directory / "tensorboard", purge_step=done + 1 if done else None)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def names_of(config: RunConfig) -> list[str]:
    names = [config.tracker] if config.tracker != "none" else []
    return names + ["tensorboard"] * (config.tensorboard and "tensorboard" not in names)


def require_packages(config: RunConfig) -> None:
    """Raise UserError, with what to install, where a tracker's package is not there."""
    for name in names_of(config):
        try:
            found = importlib.util.find_spec(name)
        except ValueError:  # it is imported, and says of itself that it was made by hand
            found = True
        if not found:
            option = "run.tensorboard" if config.tracker != name else f"run.tracker {name!r}"
            raise missing(name, option, extra=name)


def open_trackers(config: RunConfig, directory: Path, settings: dict[str, Any], done: int = 0) -> list[Tracker]:
    """Those that `config` asks for.   settings: what is shown as the run's configuration.   done: steps done before."""
    return [
        Board(directory, done) if name == "tensorboard" else Tracker(name, directory, settings, done)
        for name in names_of(config)
    ]
