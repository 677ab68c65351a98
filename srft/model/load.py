"""Loading a causal language model with its tokenizer.

    loaded = load_model(config.model)            # the embedded model, a directory, a GGUF file, or a hub name

Every model is probed when it is loaded: one whose logits head.py cannot reproduce is refused.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srft.config import ModelConfig
from srft.data.prompts import end_of_turn
from srft.errors import UserError, first_line, missing, nearest
from srft.model.dropout import without_dropout
from srft.model.embedded import embedded_model
from srft.model.gguf import read_gguf
from srft.model.head import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"


@dataclass
class LoadedModel:
    """model in train mode on `device`, without dropout unless model.dropout.

    eos_ids: every token that ends a completion.   pad_id: fills up batches.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: torch.device
    dtype: torch.dtype
    eos_ids: set[int]
    pad_id: int


def load_model(config: ModelConfig, option: str = "model.path") -> LoadedModel:
    """The model and tokenizer that `config.path` names, on its device and in its type, ready to train.

    Raises UserError for a device that is not there, a path that is neither a model directory nor a hub name that can be
    fetched, a directory without tokenizer or without all weights, code of the model's own that is not trusted, and a
    model whose head works in an unknown way.
    `option`: what messages call the path.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer, model = read(config, device, dtype, option)
    model.to(device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    check_head(model)
    if not config.dropout:
        without_dropout(model)
    eos_ids = eos_ids_of(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids)
    return LoadedModel(model.train(), tokenizer, device, dtype, eos_ids, pad_id)


def read(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, option: str
) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise missing("transformers", "loading models") from error
    disable_progress_bar()  # a bar for half a second of reading
    if device.type == "cpu":
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(not_of_cuda_kernels)
    where = f"{option} {config.path!r}"
    path = str(embedded_model()) if config.path == EMBEDDED else check_path(config.path, where)
    # "auto" is not a name that transformers knows: asked for nothing, it takes the best that the architecture has.
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    settings = attention | {"trust_remote_code": config.trust_remote_code}  # None would ask on stdin
    if path.endswith(".gguf"):
        return read_gguf(Path(path), where, dtype, **settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        advice = f"give a directory, or the name of a model on a hub in reach{nearest(config.path, [EMBEDDED])}"
        if Path(path).is_dir():
            advice = f"save one there: tokenizer.save_pretrained({config.path!r})"
        check_trust(error, where)
        raise UserError(f"{where}: no tokenizer could be loaded from it ({first_line(error)}); {advice}") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **settings)
    except Exception as error:
        check_trust(error, where)
        if attention and ("attn_implementation" in str(error) or "FlashAttention" in str(error)):
            found = (
                f"{first_line(error).rstrip('.')}; auto takes what the model has, sdpa and eager need no other package"
            )
            raise UserError(f"model.attention {config.attention!r}: {found}") from error
        raise UserError(f"{where}: no causal LM could be loaded from it: {first_line(error)}") from error
    if absent := sorted(report["missing_keys"]):  # transformers would train them from random values
        raise UserError(f"{where}: no whole causal LM: {len(absent)} weights are missing in it, such as {absent[0]}")
    return tokenizer, model


def not_of_cuda_kernels(record: logging.LogRecord) -> bool:
    """False for the advice to install kernels of Mamba, LFM2 and others that run on a GPU alone."""
    told = record.getMessage()
    return not ("reference PyTorch implementation" in told or "fast path is not available" in told)


def check_trust(error: Exception, where: str) -> None:
    """Raise UserError where the model is refused only because it brings Python code."""
    if "trust_remote_code=True" in str(error):
        advice = "read it, and if you trust it, --model.trust_remote_code true"
        raise UserError(f"{where}: it comes with Python code of its own, which is not run unasked; {advice}") from error


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
    """A local directory that looks like a model, a GGUF file, or what may be a hub name."""
    directory = Path(path).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        return str(directory)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            found = ", ".join(sorted(each.name for each in directory.iterdir())[:8]) or "nothing"
            if files := sorted(directory.glob("*.gguf")):
                raise UserError(f"{where}: the directory holds GGUF; name the file, such as {files[0]}")
            raise UserError(f"{where}: the directory has no config.json, so it is no saved model; found {found}")
        return str(directory)
    if directory.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{where}: there is no such directory; give one, a hub name, or {EMBEDDED!r}")
    return path


def eos_ids_of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    declared = declared if isinstance(declared, list) else [declared]
    return {each for each in [*declared, tokenizer.eos_token_id, end_of_turn(tokenizer)] if each is not None}
