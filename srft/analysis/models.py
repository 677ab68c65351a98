"""Which models are analysed: the base, and of each run its last model and the checkpoints that lead to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srft.checkpoint import newest_model, steps_of
from srft.errors import UserError, first_line
from srft.model import EMBEDDED

BASE = "base"
DEMONSTRATIONS = "demonstrations"


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
    if (model := newest_model(directory)) is None:
        raise UserError(f"{path}: there is no model in it; name the directory of a run that has saved one, or a model")
    steps = steps_of(directory)
    kept = steps if len(steps) <= most else [steps[i * len(steps) // most] for i in range(most)]
    checkpoints = {step: str(directory / f"checkpoint-{step}") for step in kept}
    others = {step: each for step, each in checkpoints.items() if Path(each) != model}
    return Subject(name or directory.resolve().name, str(model), others)


def subjects(base: str, runs: Sequence[str], most: int) -> list[Subject]:
    """The base first. Models of one name are called by their paths, and so is one whose name means something else.

    Raises UserError for a model that is named twice, and for weights that cannot be read.
    """
    of_base, found = subject(base, BASE), [subject(run, most=most) for run in runs]
    names = [each.name for each in found]
    twice = {name for name in names if names.count(name) > 1 or name in (BASE, DEMONSTRATIONS)}
    found = [
        subject(run, str(Path(run).absolute()), most) if each.name in twice else each for run, each in zip(runs, found)
    ]
    paths = [str(Path(each.path).resolve()) if Path(each.path).is_dir() else each.path for each in found]
    for run, path in zip(runs, paths):
        if paths.count(path) > 1:
            raise UserError(f"{run}: named twice; name each model once")
    for each in [of_base, *found]:
        for path in [each.path, *each.checkpoints.values()]:
            check_weights(Path(path))
    return [of_base, *found]


def check_weights(model: Path) -> None:
    """Raise UserError where a file of weights is damaged: found out when it is loaded, it would be late."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: cannot be read: {first_line(error)}; leave the model out, or copy it anew"
            ) from error
