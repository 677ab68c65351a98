"""Loading a causal language model with its tokenizer.

    tokenizer, positions = load_tokenizer(config.model)      # what is known without the weights
    loaded = load_model(config.model)                        # the embedded model, a directory, a GGUF file, a hub name

Every model is probed when it is loaded: one whose logits head.py cannot reproduce is refused.
"""

import importlib.util
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srft.config import ModelConfig
from srft.data.prompts import end_of_turn
from srft.errors import UserError, first_line, missing, nearest
from srft.model.adapters import add_adapters, base_of, in_directory, read_adapters
from srft.model.dropout import without_dropout
from srft.model.embedded import embedded_model
from srft.model.gguf import read_gguf, unreadable_gguf
from srft.model.head import check_head, positions
from srft.model.rows import PADDED, Rows, try_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"


@dataclass
class LoadedModel:
    """model in train mode on `device`, without dropout unless model.dropout.

    eos_ids: every token that ends a completion.   pad_id: fills up batches.   rows: how sequences may stand together.
    adapters: peft's, where those are trained and not the model's own weights.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: torch.device
    dtype: torch.dtype
    eos_ids: set[int]
    pad_id: int
    rows: Rows = PADDED
    adapters: "PeftModel | None" = None


def load_model(
    config: ModelConfig, option: str = "model.path", tokenizer: "PreTrainedTokenizerBase | None" = None
) -> LoadedModel:
    """The model and tokenizer that `config.path` names, on its device and in its type, ready to train.

    Of a directory of adapters: the model that they were made for, with them. With model.lora_rank new ones are added.
    Raises UserError for a device that is not there, a path that is neither a model directory nor a hub name that can be
    fetched, a directory without tokenizer or without all weights, code of the model's own that is not trusted, and a
    model whose head works in an unknown way.
    option: what messages call the path.   tokenizer: where `load_tokenizer` has read it already.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if tokenizer is None:
        tokenizer, _ = load_tokenizer(config, option)
    directory, base, option = beneath(config, option)
    model = load_weights(base, device, dtype, option)
    model.to(device)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    check_head(model)
    rows = try_rows(model)
    if not config.dropout:
        without_dropout(model)
    adapters = None
    if directory:
        adapters = read_adapters(model, directory, config)
    elif config.lora_rank:
        adapters = add_adapters(model, config)
    eos_ids = eos_ids_of(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids)
    return LoadedModel(model.train(), tokenizer, device, dtype, eos_ids, pad_id, rows, adapters)


def merged(loaded: LoadedModel) -> LoadedModel:
    """With its adapters added to the weights, which are then all trained. `loaded` is of no use any more."""
    if loaded.adapters is None:
        return loaded
    return replace(loaded, model=loaded.adapters.merge_and_unload().requires_grad_(True), adapters=None)


def load_merged(config: ModelConfig, directory: Path, loaded: LoadedModel) -> LoadedModel:
    """The same of a model that is sharded, whose adapters are saved in `directory`; on the CPU."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    config = replace(config, path=str(directory), device="cpu", dtype=dtype, attention="auto")
    return merged(load_model(replace(config, gradient_checkpointing=False), tokenizer=loaded.tokenizer))


def beneath(config: ModelConfig, option: str) -> tuple[Path | None, ModelConfig, str]:
    """(the directory of adapters that model.path is, if any; the model that they are for; what messages call that)."""
    if (directory := in_directory(config.path)) is None:
        return None, config, option
    return directory, replace(config, path=base_of(directory)), f"{option} {config.path!r}: the model of its adapters,"


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """By the name of transformers 5.23 on, or the older one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def load_tokenizer(config: ModelConfig, option: str = "model.path") -> tuple["PreTrainedTokenizerBase", float]:
    """The tokenizer of `config.path` alone, and the most tokens that a sequence of the model may have.

    Raises UserError as `load_model` does.
    """
    directory, base, option = beneath(config, option)
    path, where, settings = source(base, option)
    from transformers import AutoConfig, AutoTokenizer

    given = {"trust_remote_code": config.trust_remote_code}
    own = directory is not None and (directory / "tokenizer_config.json").is_file()
    try:
        if own:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), **given)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **settings, **given)
    except Exception as error:
        check_trust(error, where)
        if settings:
            raise unreadable_gguf(where, error) from error
        advice = f"give a directory, or the name of a model on a hub in reach{nearest(config.path, [EMBEDDED])}"
        if Path(path).is_dir():
            advice = f"save one there: tokenizer.save_pretrained({config.path!r})"
        raise UserError(f"{where}: no tokenizer could be loaded from it ({first_line(error)}); {advice}") from error
    try:
        model = AutoConfig.from_pretrained(path, **settings, **given)
    except Exception as error:
        check_trust(error, where)
        if settings:
            raise unreadable_gguf(where, error) from error
        raise UserError(f"{where}: no causal LM could be loaded from it: {first_line(error)}") from error
    check_kind(model, where)
    return tokenizer, positions(model)


def check_kind(model: "PreTrainedConfig", where: str) -> None:
    """Raise UserError for a model that transformers would make a causal LM of, though it is another kind."""
    names = ", ".join(model.architectures or [])
    if getattr(model, "is_encoder_decoder", False):
        raise UserError(f"{where}: {names or model.model_type} is an encoder-decoder; srft trains causal LMs")
    if "MaskedLM" in names:
        raise UserError(f"{where}: {names}: its tokens see those that follow them; srft trains causal LMs")


def load_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, option: str) -> "PreTrainedModel":
    path, where, gguf = source(config, option)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for half a second of reading
    if device.type == "cpu":
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(not_of_cuda_kernels)
    # "auto" is not a name that transformers knows: asked for nothing, it takes the best that the architecture has.
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    settings = attention | {"trust_remote_code": config.trust_remote_code}  # None would ask on stdin
    if gguf:
        return read_gguf(Path(path) / gguf["gguf_file"], where, dtype, **settings)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is wrong is said below
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
    finally:
        transformers_logging.set_verbosity(verbosity)
    if absent := sorted(report["missing_keys"]):  # transformers would train them from random values
        raise UserError(f"{where}: no whole causal LM: {len(absent)} weights are missing in it, such as {absent[0]}")
    return model


def source(config: ModelConfig, option: str) -> tuple[str, str, dict[str, str]]:
    """Where transformers finds the model, what messages call it, and what it needs to read a GGUF file.

    Raises UserError where a package is missing, or nothing can be there.
    """
    if importlib.util.find_spec("transformers") is None:
        raise missing("transformers", "loading models")
    where = f"{option} {config.path!r}"
    path = str(embedded_model()) if config.path == EMBEDDED else check_path(config.path, where)
    if not path.endswith(".gguf"):
        return path, where, {}
    if importlib.util.find_spec("gguf") is None:
        raise missing("gguf", where)
    file = Path(path)
    return str(file.parent), where, {"gguf_file": file.name}


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
    if directory.suffix == ".gguf":
        if not directory.is_file():
            raise UserError(f"{where}: there is no such file")
        return str(directory)
    if directory.is_file():
        raise UserError(f"{where}: a file; give the directory that it lies in")
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
