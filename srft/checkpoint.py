"""Checkpoints: a directory that `transformers` (and `model.path`) can load, there completely or not at all."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from srft.errors import UserError
from srft.model import LoadedModel


def save(loaded: LoadedModel, directory: Path) -> Path:
    """Write model (safetensors) and tokenizer to `directory`, which must not exist yet; returns it.

    They are written beside it first and then renamed, so an interrupted save leaves nothing that looks like a
    checkpoint. Raises UserError where that fails (a full disk, say).
    """
    if directory.exists():
        raise UserError(f"checkpoint: {directory} exists already; name another directory")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # the left-over of an interrupted save
    try:
        partial.mkdir(parents=True)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        return partial.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
        raise UserError(f"checkpoint: {directory} could not be written: {error}") from error
