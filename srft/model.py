"""Loading a causal language model, and reading its head so that the loss never needs its logits.

    loaded = load_model(config.model)                       # the embedded model, a directory, or a hub name
    head = head_of(loaded.model)                            # weight (V, H), bias, soft cap, logit scale
    hidden = hidden_states(loaded.model, ids, mask)         # (B, L, H); logits = softcap(scale · hidden Wᵀ + bias)

Every model is probed when it is loaded: one whose logits this file cannot reproduce is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srft.config import ModelConfig
from srft.embedded import embedded_model
from srft.errors import UserError, missing, nearest
from srft.prompts import end_of_turn

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


@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap · tanh(a / softcap) with a = logit_scale · (hidden · weightᵀ + bias).

    weight (V, H): the model's own Parameter, shared with the embedding where they are tied.   bias (V,) or None.
    vocab_size: the number of real columns where the weight is padded beyond it, else None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    vocab_size: int | None


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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def head_of(model: "PreTrainedModel") -> Head:
    """Weight, bias, soft cap and logit scale of the output layer, by the names that transformers' configs give them."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None) or None
    vocab_size = config.vocab_size if config.vocab_size < layer.weight.shape[0] else None
    return Head(layer.weight, getattr(layer, "bias", None), softcap, float(scale), vocab_size)


def hidden_states(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The last hidden states (B, L, H), after the final norm, for ids (B, L); no logits are made.

    attention_mask: (B, L), or (B, 1, L, L) bool, true where a query (row) sees a key (column).   position_ids: (B, L).
    """
    if attention_mask.ndim == 4:  # sdpa and eager attention both add a mask of the model's type
        added = torch.zeros_like(attention_mask, dtype=model.dtype)
        attention_mask = added.masked_fill_(~attention_mask, torch.finfo(model.dtype).min)
    positions = {} if position_ids is None else {"position_ids": position_ids}  # not every backbone takes them
    backbone = model.get_decoder()
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).last_hidden_state


@torch.no_grad()
def check_head(model: "PreTrainedModel") -> None:
    """Raise UserError unless `head_of` and `hidden_states` reproduce the model's own logits on a few tokens."""
    training = model.training
    model.eval()
    try:
        head = head_of(model)
        ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
        mask = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        hidden = hidden_states(model, ids, mask)
        logits = head.logit_scale * torch.nn.functional.linear(hidden, head.weight, head.bias).float()
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        error = (logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        reason = f"logits differ by {error:.1%} from those of its own forward" if not error < 0.02 else ""
    except Exception as problem:
        reason = first_line(problem)
    model.train(training)
    if reason:
        raise UserError(f"{type(model).__name__}: its output layer works in a way that srft does not know: {reason}")
