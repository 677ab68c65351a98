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
    targets = [each for each in config.lora_targets if each != ALL]
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
    path = Path(config.path).expanduser()
    settings.base_model_name_or_path = str(path.resolve()) if path.exists() else config.path
    return adapters


def read_adapters(model: "PreTrainedModel", directory: Path, config: ModelConfig) -> "PeftModel":
    """Those of a directory, to be trained on. UserError where they are others than model.lora_rank says."""
    where = f"model.path {str(directory)!r}"
    try:
        with quiet():
            adapters = peft(where).PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except Exception as error:
        raise UserError(f"{where}: its adapters could not be loaded: {first_line(error)}") from error
    found = adapters.peft_config["default"]
    if found.peft_type != "LORA":
        raise UserError(f"{where}: adapters of {found.peft_type.value}; srft reads LoRA: merge others into their model")
    if config.lora_rank not in (0, found.r):
        raise UserError(
            f"model.lora_rank {config.lora_rank}: the adapters in {directory} have rank {found.r}; leave it out"
        )
    if any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters()):
        raise UserError(f"{where}: it has adapters beside the head, which srft does not train; merge them first")
    return adapters


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
    """While it lasts, the model is what it was before them. What is trained stays so, of which FSDP2 asks once."""
    if adapters is None:
        yield
        return
    trained = [weight for weight in adapters.parameters() if weight.requires_grad]
    with adapters.disable_adapter():
        for weight in trained:
            weight.requires_grad_(True)
        yield


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
