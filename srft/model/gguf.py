"""Models in one GGUF file, as llama.cpp writes them: dequantised into an ordinary model.

transformers knows the architectures, names and tensors; its own `from_pretrained(gguf_file=…)` would need `accelerate`,
and ends in a model that refuses to be saved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srft.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_gguf(file: Path, where: str, dtype: torch.dtype, **settings: Any) -> "PreTrainedModel":
    """The model of a GGUF file. `where` opens messages; `settings` go to transformers' `from_config`.

    Raises UserError for a file that is none, an architecture that transformers cannot read from GGUF, and weights that
    are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
        weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        absent, unknown = model.load_state_dict(weights, strict=False)
    except Exception as error:
        raise unreadable_gguf(where, error) from error
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if problems := sorted({*absent} - tied) or sorted(unknown):
        raise UserError(f"{where}: weights of this GGUF file do not fit {type(model).__name__}, such as {problems[0]}")
    return model


def unreadable_gguf(where: str, error: Exception) -> UserError:
    advice = "a directory with safetensors is read for more architectures"
    return UserError(f"{where}: no causal LM could be read from this GGUF file: {first_line(error)}; {advice}")
