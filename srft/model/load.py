"""Loading a causal language model with its tokenizer.

    loaded = load_model(config.model)                       # the embedded model, a directory, or a hub name

Every model is probed when it is loaded: one whose logits head.py cannot reproduce is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srft.config import ModelConfig
from srft.data.prompts import end_of_turn
from srft.errors import UserError, first_line, missing, nearest
from srft.model.embedded import embedded_model
from srft.model.head import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"


@dataclass
class LoadedModel:
    """model in train mode on `device`; eos_ids: every token that ends a completion; pad_id: fills up batches."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: torch.device
    dtype: torch.dtype
    eos_ids: set[int]
    pad_id: int


def load_model(config: ModelConfig, option: str = "model.path") -> LoadedModel:
    """The model and tokenizer that `config.path` names, on its device and in its type, ready to train.

    Raises UserError for a device that is not there, a path that is neither a model directory nor a hub name that can be
    fetched, a directory without tokenizer or without all weights, and a model whose head works in an unknown way.
    `option`: what messages call the path.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer, model = read(config, dtype, option)
    model.to(device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    check_head(model)
    eos_ids = eos_ids_of(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids)
    return LoadedModel(model.train(), tokenizer, device, dtype, eos_ids, pad_id)


def read(config: ModelConfig, dtype: torch.dtype, option: str) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise missing("transformers", "loading models") from error
    logging.disable_progress_bar()  # a bar for half a second of reading
    where = f"{option} {config.path!r}"
    path = embedded_model() if config.path == EMBEDDED else check_path(config.path, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        advice = f"give a directory, or the name of a model on a hub in reach{nearest(config.path, [EMBEDDED])}"
        if Path(path).is_dir():
            advice = f"save one there: tokenizer.save_pretrained({config.path!r})"
        raise UserError(f"{where}: no tokenizer could be loaded from it ({first_line(error)}); {advice}") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.attention, output_loading_info=True
        )
    except Exception as error:
        if "attn_implementation" in str(error) or "FlashAttention" in str(error):
            found = f"{first_line(error).rstrip('.')}; sdpa and eager need no other package"
            raise UserError(f"model.attention {config.attention!r}: {found}") from error
        raise UserError(f"{where}: no causal LM could be loaded from it: {first_line(error)}") from error
    if absent := sorted(report["missing_keys"]):  # transformers would train them from random values
        raise UserError(f"{where}: no whole causal LM: {len(absent)} weights are missing in it, such as {absent[0]}")
    return tokenizer, model


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"model.device: {name!r} cannot be used: {first_line(error)}; auto takes what there is"
        ) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def check_path(path: str, where: str) -> str:
    """A local directory that looks like a model, or what may be a hub name."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            found = ", ".join(sorted(each.name for each in directory.iterdir())[:8]) or "nothing"
            raise UserError(f"{where}: the directory has no config.json, so it is no saved model; found {found}")
        return str(directory)
    if directory.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{where}: there is no such directory; give one, a hub name, or {EMBEDDED!r}")
    return path


def eos_ids_of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    declared = declared if isinstance(declared, list) else [declared]
    return {each for each in [*declared, tokenizer.eos_token_id, end_of_turn(tokenizer)] if each is not None}
