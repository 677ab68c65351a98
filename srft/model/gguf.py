"""Models in one GGUF file, as llama.cpp writes them: dequantised into an ordinary model.

transformers knows the architectures, names and tensors; its own `from_pretrained(gguf_file=…)` would need `accelerate`,
and ends in a model that refuses to be saved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srft.errors import UserError, first_line, missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_gguf(
    file: Path, where: str, dtype: torch.dtype, **settings: Any
) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    """Tokenizer and model of a GGUF file. `where` opens messages; `settings` go to transformers' `from_config`.

    Raises UserError for a file that is none, an architecture that transformers cannot read from GGUF, and weights that
    are missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise missing("gguf", f"{where}") from error
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
        weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        absent, unknown = model.load_state_dict(weights, strict=False)
    except Exception as error:
        advice = "a directory with safetensors is read for more architectures"
        raise UserError(
            f"{where}: no causal LM could be read from this GGUF file: {first_line(error)}; {advice}"
        ) from error
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if problems := sorted({*absent} - tied) or sorted(unknown):
        raise UserError(f"{where}: weights of this GGUF file do not fit {type(model).__name__}, such as {problems[0]}")
    return tokenizer, model
