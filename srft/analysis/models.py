"""Which models are analysed: the base, and of each run its last model and the checkpoints that lead to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srft.checkpoint import newest_model, steps_of
from srft.errors import UserError
from srft.model import EMBEDDED

BASE = "base"


@dataclass(frozen=True)
class Subject:
    """A model. path: as load_model takes it.   checkpoints: {step: path} on its way, the model itself not included."""

    name: str
    path: str
    checkpoints: dict[int, str] = field(default_factory=dict)


def subject(path: str, name: str = "", most: int = 0) -> Subject:
    """The model that a path names: a run's last one, a checkpoint, a directory of a model, or a name on a hub.

    most: of the run's checkpoints, evenly.   Raises UserError where there is no model.
    """
    directory = Path(path).expanduser()
    if path == EMBEDDED or not directory.is_dir():
        if path != EMBEDDED and (directory.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise UserError(f"{path}: expected a directory of a run or of a model, or the name of a model on a hub")
        return Subject(name or Path(path).name, path)
    if (directory / "config.json").is_file():
        return Subject(name or directory.resolve().name, str(directory))
    model = directory / "final" if (directory / "final").is_dir() else newest_model(directory)
    if model is None:
        raise UserError(f"{path}: there is no model in it; name the directory of a run that has saved one, or a model")
    steps = steps_of(directory)
    kept = steps if len(steps) <= most else [steps[i * len(steps) // most] for i in range(most)]
    checkpoints = {step: str(directory / f"checkpoint-{step}") for step in kept}
    others = {step: each for step, each in checkpoints.items() if Path(each) != model}
    return Subject(name or directory.resolve().name, str(model), others)


def subjects(base: str, runs: Sequence[str], most: int) -> list[Subject]:
    """The base first. Two models of one name are called by their paths."""
    of_base, found = subject(base, BASE), [subject(run, most=most) for run in runs]
    names = [each.name for each in found]
    twice = {name for name in names if names.count(name) > 1 or name == BASE}
    found = [subject(run, run, most) if each.name in twice else each for run, each in zip(runs, found)]
    names = [each.name for each in found]
    if again := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{again[0]}: named twice; name each model once")
    return [of_base, *found]
