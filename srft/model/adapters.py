"""LoRA, by peft: two small matrices beside a weight matrix are trained, and the model's own weights are not.

The layers are put into the model itself, which stays what it was for everybody else; peft's wrapper around it is kept
to save, merge and switch off. The head has none: the loss reads its weight, beside which they would train nothing.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srft.config import ModelConfig
from srft.errors import UserError, first_line, missing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FILE = "adapter_config.json"  # of a directory that holds adapters
ALL = "all-linear"  # peft's word for every linear layer but the head


def add_adapters(model: "PreTrainedModel", config: ModelConfig) -> "PeftModel":
    """New ones, as model.lora_* says; until they are trained the model says what it said without them.

    They begin alike in each process: ranks make their own.
    Raises UserError where model.lora_targets names no layer, or the head.
    """
    where = f"model.lora_targets {config.lora_targets}"
    weight = model.get_output_embeddings().weight
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    head = {last(name) for name, module in layers.items() if module.weight is weight}
    targets = [] if config.lora_targets == [ALL] else config.lora_targets
    if config.lora_targets == [] or ALL in targets:
        raise UserError(f"{where}: give names of layers, or {ALL!r} alone")
    for target in targets:
        if last(target) in head:
            raise UserError(f"{where}: {target} is the head, beside which adapters would train nothing; leave it out")
        if last(target) not in map(last, layers):
            others = ", ".join(sorted({*map(last, layers)} - head))
            raise UserError(f"{where}: no layer is called {target!r}; there are {others}, or {ALL!r}")
    settings = peft(where).LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets or ALL,
    )
    try:
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            adapters = peft(where).get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    settings.base_model_name_or_path = wherever(config.path)
    return adapters


def read_adapters(model: "PreTrainedModel", directory: Path, config: ModelConfig) -> "PeftModel":
    """Those of a directory, to be trained on.

    Raises UserError for others than LoRA, for some beside the head, and for another rank than model.lora_rank.
    """
    where, head = f"model.path {str(directory)!r}", model.get_output_embeddings()
    whole = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight}
    whole |= {name for name, weight in model.named_parameters() if weight is model.get_input_embeddings().weight}
    try:
        found = peft(where).PeftConfig.from_pretrained(str(directory))
        if found.peft_type != "LORA" or found.layer_replication:
            kind = "LoRA that repeats layers" if found.peft_type == "LORA" else found.peft_type.value
            raise UserError(f"{where}: adapters of {kind}; srft reads plain LoRA: merge others into their model")
        with quiet():
            adapters = peft(where).PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: its adapters could not be loaded: {first_line(error)}") from error
    if config.lora_rank not in (0, found.r):
        given = f"model.lora_rank {config.lora_rank}"
        raise UserError(f"{given}: the adapters in {directory} have rank {found.r}; leave it out")
    beside = [each for each in model.modules() if each is head or getattr(each, "weight", None) is head.weight]
    if any("lora_" in name for each in beside for name, _ in each.named_parameters()):
        raise UserError(f"{where}: it has adapters beside the head, which srft does not train; merge them first")
    if not found.modules_to_save and whole & {name.removeprefix("base_model.model.") for name in names_in(directory)}:
        raise UserError(f"{where}: it has whole embeddings beside its adapters; merge them first")
    adapters.peft_config["default"].base_model_name_or_path = wherever(base_of(directory))
    return adapters


def wherever(path: str) -> str:
    """The name of a model that means the same in another working directory."""
    place = Path(path).expanduser()
    return str(place.resolve()) if place.exists() else path


def names_in(directory: Path) -> list[str]:
    """The weights in a file of adapters."""
    from safetensors import safe_open

    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def in_directory(path: str) -> Path | None:
    """The directory of adapters that model.path is, if it is one."""
    directory = Path(path).expanduser()
    return directory if (directory / FILE).is_file() else None


def base_of(directory: Path) -> str:
    """The model that the adapters in a directory were made for."""
    try:
        if base := json.loads((directory / FILE).read_text(encoding="utf-8")).get("base_model_name_or_path"):
            return base
        found = "it has no base_model_name_or_path"
    except (OSError, ValueError, AttributeError) as error:
        found = f"it cannot be read: {first_line(error)}"
    raise UserError(f"{directory / FILE}: {found}; it has to name the model that the adapters are for")


@contextlib.contextmanager
def without_adapters(adapters: "PeftModel | None") -> Iterator[None]:
    """While it lasts, the model is what it was before them, without dropout.

    What is trained stays so, of which FSDP2 asks once.
    """
    if adapters is None:
        yield
        return
    trained = [weight for weight in adapters.parameters() if weight.requires_grad]
    model = adapters.get_base_model()
    training = model.training
    model.eval()
    try:
        with adapters.disable_adapter():
            for weight in trained:
                weight.requires_grad_(True)
            yield
    finally:
        model.train(training)


def save_adapters(adapters: "PeftModel", directory: Path, weights: dict[str, Tensor] | None) -> None:
    """As peft does. weights: by their names in the model, where they are not whole in it."""
    state = None if weights is None else {f"base_model.model.{name}": each for name, each in weights.items()}
    with quiet():
        adapters.save_pretrained(str(directory), state_dict=state, save_embedding_layers=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what peft makes transformers warn of: names that are to change, which is theirs to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def last(name: str) -> str:
    return name.rpartition(".")[2]


def peft(asked: str) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise missing("peft", asked, "lora")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for other processors
    import peft

    return peft
