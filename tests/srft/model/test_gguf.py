"""Models in a GGUF file."""

import pytest
import torch

from srft.checkpoint import save
from srft.config import ModelConfig
from srft.errors import UserError
from srft.model import load_model
from tests.srft.conftest import byte_tokenizer, tiny_model

gguf = pytest.importorskip("gguf")


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rotary pairs, as its converter writes it."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(path, model, architecture="llama"):
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(config.vocab_size - 2)), "ab", "cd"])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stem = name.removesuffix(".weight")
        writer.add_tensor(f"{names.get_name(stem)}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_like_any_other(tmp_path):
    made = tiny_model(vocab_size=260)
    write(tmp_path / "tiny.gguf", made)
    loaded = load_model(ModelConfig(str(tmp_path / "tiny.gguf"), device="cpu"))
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in made.state_dict().items())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight and loaded.eos_ids == {0}
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("2 + 3")) == "2 + 3"
    again = load_model(ModelConfig(str(save(loaded, tmp_path / "saved")), device="cpu"))
    assert torch.equal(again.model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    with pytest.raises(UserError, match=r"the directory holds GGUF; name the file, such as .*tiny\.gguf"):
        load_model(ModelConfig(str(tmp_path), device="cpu"))


def test_a_gguf_file_that_cannot_be_read_is_told(tmp_path):
    write(tmp_path / "odd.gguf", tiny_model(vocab_size=260), "rwkv6")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF, or not")
    for name, expected in (("odd", "architecture rwkv6 is not supported"), ("cut", "")):
        message = rf"{name}\.gguf': no causal LM could be read from this GGUF file: .*{expected}.*safetensors"
        with pytest.raises(UserError, match=message):
            load_model(ModelConfig(str(tmp_path / f"{name}.gguf"), device="cpu"))
