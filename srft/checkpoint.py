"""Checkpoints: a directory that `transformers` (and `model.path`) can load, there completely or not at all.

Where a run can go on from it (`srft train --resume`), its subdirectory `state` holds the fp32 weights and the
optimizer's moments, written by torch.distributed.checkpoint: each rank its part, to be loaded on any number of ranks.
"""

import math
import re
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from srft.errors import UserError, disk_full
from srft.model import LoadedModel
from srft.model.adapters import FILE, save_adapters
from srft.ranks import Ranks

STATE = "state"


def save(
    loaded: LoadedModel, directory: Path, ranks: Ranks | None = None, state: dict[str, Tensor] | None = None
) -> Path:
    """Write model (safetensors), tokenizer and `state` to `directory`, which must not exist yet; returns it.

    Where adapters are trained they are what is written.
    They are written beside it first and then renamed, so an interrupted save leaves nothing that looks like a
    checkpoint. All ranks must call it. Raises UserError where that fails (a full disk, say).
    """
    ranks = ranks or Ranks()
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if ranks.main:
            if directory.exists():
                raise UserError(f"checkpoint: {directory} exists already; name another directory")
            shutil.rmtree(partial, ignore_errors=True)  # the left-over of an interrupted save
            partial.mkdir(parents=True)
            loaded.tokenizer.save_pretrained(partial)
        weights = ranks.state_dict(loaded)
        if ranks.main:
            if loaded.adapters:
                save_adapters(loaded.adapters, partial, weights)
            else:
                loaded.model.save_pretrained(partial, state_dict=weights)
        if state is not None:
            write_state(state, partial / STATE, ranks)
        if ranks.main:
            partial.rename(directory)
            older = directory.parent.glob(f"checkpoint-*/{STATE}") if state else ()
            for each in older:  # three times the size of an fp32 model: only the newest is kept
                if each.parent != directory:
                    shutil.rmtree(each)
    except (OSError, SafetensorError) as error:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
        raise UserError(f"checkpoint: {directory} could not be written: {error}{disk_full(error)}") from error
    return directory


def prune(run: Path, keep: int, rewards: dict[int, float]) -> None:
    """Delete all of a run's checkpoints but the newest `keep`, the best by held-out reward, and what --resume needs.

    rewards: by step, of the evaluations; a checkpoint of a step without one cannot be the best.
    """
    steps = steps_of(run)
    rated = [step for step in steps if math.isfinite(rewards.get(step, math.nan))]
    kept = {*steps[-keep:], *sorted(rated, key=lambda step: (rewards[step], step))[-1:]}
    for step in sorted({*steps} - kept):
        directory = run / f"checkpoint-{step}"
        if not (directory / STATE).exists():
            directory.rename(run / f".{directory.name}.partial")  # half deleted it must not look like a checkpoint
    for partial in run.glob(".checkpoint-*.partial"):  # also what an interrupted save or deletion has left
        shutil.rmtree(partial)


def write_state(state: dict[str, Tensor], directory: Path, ranks: Ranks) -> None:
    """Raises OSError, on every rank, where any rank cannot write."""
    _state_io("save", state, directory, ranks)


def read_state(state: dict[str, Tensor], directory: Path, ranks: Ranks) -> None:
    """Load into the tensors of `state`, whatever number of ranks wrote it. UserError where they are not those saved."""
    try:
        _state_io("load", state, directory, ranks)
    except OSError as error:
        raise UserError(f"{directory}: cannot be loaded: {error}; take another checkpoint") from error


def _state_io(function: str, state: dict[str, Tensor], directory: Path, ranks: Ranks) -> None:
    from torch.distributed import checkpoint as dcp

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process, as it should be
            getattr(dcp, function)(state, checkpoint_id=directory, no_dist=ranks.size == 1)
    except dcp.CheckpointException as error:  # not an Exception; it takes signals for failures too
        for failure, *_ in error.failures.values():
            if isinstance(failure, KeyboardInterrupt):
                raise failure from None
        raise OSError("; ".join(str(failure[0]) for failure in error.failures.values())) from error


def resumable(directory: str) -> Path:
    """The checkpoint that `directory` is, or the newest in it that a run can go on from.

    Raises UserError, which says what there is instead, where no state is.
    """
    path = Path(directory)
    if (path / STATE).is_dir():
        return path.resolve() if path.name in ("", "..") else path
    if newest := newest_with_state(path):
        return newest
    where = f"--resume {directory}: expected the directory of a run with run.checkpoint_every"
    if not path.is_dir():
        raise UserError(f"{where}; there is no such directory")
    if newest := newest_with_state(path.parent):
        raise UserError(f"{where}; only its newest checkpoint keeps a {STATE} to go on from: --resume {newest}")
    advice = ""
    if model := newest_model(path):
        advice = f"; {model} holds the model only: a new run starts from it with --model.path {model}"
    raise UserError(f"{where}; found no checkpoint-N with a {STATE} in it{advice}")


def newest_model(directory: Path) -> Path | None:
    """The last saved model that the directory is, or that lies in it."""
    names = [f"{within}{name}" for name in ("config.json", FILE) for within in ("", "[!.]*/")]
    models = [each.parent for name in names for each in directory.glob(name)]

    def age(model: Path) -> tuple[float, float, float]:
        """By its step where its name has one, for files that were copied are all new."""
        named = re.fullmatch(r"(?:checkpoint|interrupted)-(\d+)", model.name)
        last = {"final": 2.0, "adapter": 1.0}.get(model.name, 0.0)
        return last, float(named[1]) if named else -1.0, model.stat().st_mtime

    return max(models, key=age, default=None)


def newest_with_state(run: Path) -> Path | None:
    checkpoints = [each.parent for each in run.glob(f"checkpoint-*/{STATE}") if each.parent.name[11:].isdecimal()]
    return max(checkpoints, key=step_of, default=None)


def steps_of(run: Path) -> list[int]:
    """Of the run's checkpoints, in order."""
    return sorted(int(each.name[11:]) for each in run.glob("checkpoint-*") if each.name[11:].isdecimal())


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint's run had done."""
    if not (name := re.fullmatch(r"checkpoint-(\d+)", checkpoint.resolve().name)):
        raise UserError(f"--resume {checkpoint}: expected a directory called checkpoint-N, within that of its run")
    return int(name[1])
