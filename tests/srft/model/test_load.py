"""Loading models, and what is said about directories and names that are none."""

import importlib.util
import json

import pytest
import torch
import transformers

from srft.config import ModelConfig
from srft.errors import UserError
from srft.model import load_model
from tests.srft.conftest import byte_tokenizer, tiny_model


def test_load_a_directory(tiny_dir):
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    assert loaded.model.training and loaded.dtype is torch.float32 and loaded.device.type == "cpu"
    assert loaded.eos_ids == {0} and loaded.pad_id == 0
    assert load_model(ModelConfig(path=str(tiny_dir), device="cpu", dtype="bfloat16")).model.dtype is torch.bfloat16


def test_every_declared_end_token_ends(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [0, 7]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path), device="cpu")).eos_ids == {0, 7}


def test_a_directory_without_tokenizer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    assert str(error.value).startswith(f"model.path {str(tmp_path)!r}: no tokenizer could be loaded from it (")
    assert str(error.value).endswith(f"; save one there: tokenizer.save_pretrained({str(tmp_path)!r})")


def test_a_name_that_is_not_on_the_hub(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path="smolm2", device="cpu"))
    assert str(error.value) == (
        "model.path 'smolm2': no tokenizer could be loaded from it (We couldn't connect to the hub); "
        "give a directory, or the name of a model on a hub in reach; did you mean 'smollm2'?"
    )


def test_a_model_that_lacks_weights(tmp_path):
    model = tiny_model()
    weights = {name: value for name, value in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"no whole causal LM: 9 weights are missing in it, such as model.layers.1.input_layernorm"
    ):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def test_directories_that_are_no_model(tmp_path):
    (tmp_path / "notes.txt").touch()
    for path, expected in [
        (str(tmp_path), "the directory has no config.json, so it is no saved model; found notes.txt"),
        (str(tmp_path / "none"), "there is no such directory; give one, a hub name, or 'smollm2'"),
        ("./none", "there is no such directory; give one, a hub name, or 'smollm2'"),
        (str(tmp_path / "notes.txt"), "a file; give the directory that it lies in"),
        (str(tmp_path / "none.gguf"), "there is no such file"),
    ]:
        with pytest.raises(UserError) as error:
            load_model(ModelConfig(path=path, device="cpu"))
        assert str(error.value) == f"model.path {path!r}: {expected}"
        with pytest.raises(UserError) as error:
            load_model(ModelConfig(path=path, device="cpu"), "--checkpoint")
        assert str(error.value) == f"--checkpoint {path!r}: {expected}"


def test_a_directory_with_broken_weights(tiny_dir, tmp_path):
    for file in tiny_dir.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(UserError, match="no causal LM could be loaded from it: "):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("name", ["sdpaa", "flash_attention_2"])
def test_an_attention_that_is_not_there(tiny_dir, name):
    if name != "sdpaa" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(
        UserError, match=f"^model.attention '{name}': .*; auto takes what .*, sdpa and eager need no other package"
    ):
        load_model(ModelConfig(path=str(tiny_dir), device="cpu", attention=name))


def test_a_device_that_is_not_there(tiny_dir):
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"model.device: '{name}' cannot be used: .*; auto takes what there is"):
            load_model(ModelConfig(path=str(tiny_dir), device=name))


def test_the_attention_is_transformers_own_choice(tmp_path):
    settings = {"vocab_size": 258, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0, "eos_token_id": 0}
    transformers.BloomForCausalLM(transformers.BloomConfig(**settings)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    assert loaded.model.config._attn_implementation == "eager"  # all that Bloom has
    with pytest.raises(UserError, match=r"^model\.attention 'sdpa': BloomForCausalLM does not support"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu", attention="sdpa"))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_foreign_code_is_run_only_where_it_is_trusted_and_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    expected = "it comes with Python code of its own, .* --model.trust_remote_code true"
    with pytest.raises(UserError, match=f"^model.path '.*model': {expected}"):
        load_model(ModelConfig(path=str(model), device="cpu"))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("own.py"))
    assert type(load_model(ModelConfig(str(model), device="cpu", trust_remote_code=True)).model).__name__ == "Own"


def test_what_is_no_causal_model_is_named(tmp_path, capfd):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    bert = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**bert, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    t5 = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**t5)).save_pretrained(tmp_path / "t5")
    capfd.readouterr()
    for name, expected in (
        ("bert", "BertForMaskedLM: its tokens see those that follow them; srft trains causal LMs"),
        ("t5", "T5ForConditionalGeneration is an encoder-decoder; srft trains causal LMs"),
    ):
        byte_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=expected):
            load_model(ModelConfig(path=str(tmp_path / name), device="cpu"))
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_by_its_newest_name(tiny_dir):
    model = load_model(ModelConfig(str(tiny_dir), device="cpu", gradient_checkpointing=True)).model
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
