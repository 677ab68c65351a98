import json
import math
import shutil
import types

import numpy as np
import pytest
import torch

from srft import checkpoint
from srft.analysis import analyze
from srft.analysis.analyze import pieces_of
from srft.analysis.gradients import gradients
from srft.analysis.texts import learnable
from srft.cli import main
from srft.config import Config, ModelConfig
from srft.model import load_model
from srft.settings import load
from tests.srft.analysis.conftest import ROW, logprobs_of
from tests.srft.conftest import tiny_model

OPTIONS = [
    "--analyze.prompts",
    "2",
    "--rollout.max_new_tokens",
    "6",
    "--analyze.shares",
    "0.2",
    "--model.device",
    "cpu",
]


def analysed(tmp_path, *paths: str) -> dict:
    assert main(["analyze", *paths, *OPTIONS, "--analyze.dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/index.html").exists() and (tmp_path / "out/config.toml").exists()
    return json.loads((tmp_path / "out/analysis.json").read_text())


def test_a_model_against_itself_says_zero_everywhere(tmp_path, tiny_dir, capsys):
    result = analysed(tmp_path, str(tiny_dir), str(tiny_dir))
    assert list(result["sets"]) == ["task", "basic_arithmetic", "products"]
    of_base, of_model = result["models"].values()
    for writers in of_model["shift"].values():
        for own in writers.values():
            assert not any(own[key] for key in ("kl", "js", "change", "changed", "marginal", "shifted"))
            assert own["unshifted"] == 1 and own["entropy_before"] == own["entropy_after"] > 0
    assert of_model["rewards"] == of_base["rewards"] and of_model["gradients"] == of_base["gradients"]
    assert of_model["weights"]["share"] == 0 and not any(each["x"] or each["js"] for each in result["map"]["points"])
    asked = [each["swapped"] for each in of_model["crossing"]]
    assert asked == [0, 0, 1, 0, 0, 1] and not of_base["crossing"]
    assert all(not change for text in of_model["texts"] for _, change in text["tokens"])
    assert "base" in capsys.readouterr().out


def test_a_run_with_its_checkpoints_and_what_has_changed_in_it(tmp_path, tiny_dir):
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    run = tmp_path / "run"
    for step in (1, 2):
        with torch.no_grad():
            loaded.model.get_output_embeddings().weight[ROW] += 0.2  # tied: of the embedding too
        for name in (f"checkpoint-{step}", *["final"] * (step == 2)):
            loaded.model.save_pretrained(run / name)
            loaded.tokenizer.save_pretrained(run / name)
    result = analysed(tmp_path, str(tiny_dir), str(run))
    of_model = result["models"]["run"]
    assert of_model["shift"]["task"]["base"]["kl"] > 0
    changed = {name: many for name, (many, _) in of_model["weights"]["matrices"].items() if many}
    assert changed == {"model.embed_tokens": 32}
    points = {each["step"]: each["js"] for each in result["map"]["points"] if each["model"] == "run"}
    assert list(points) == [1, 2, None] and 0 < points[1] < points[2]
    assert points[2] == pytest.approx(points[None], rel=1e-4), "the last checkpoint is the model"
    crossing = of_model["crossing"]
    assert [each["writer"] for each in crossing] == ["base"] * 3 + ["run"] * 3
    assert (
        0 < crossing[1]["swapped"] < 1
        and crossing[0]["reward"] == result["models"]["base"]["rewards"]["task"]["reward"]
    )


def moved(tiny_dir, run, seed: int, amount: float):
    """A model whose weights have all moved, in run/final."""
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight += amount * torch.randn(weight.shape, generator=generator)
    loaded.model.save_pretrained(run / "final")
    loaded.tokenizer.save_pretrained(run / "final")
    return loaded


def test_every_number_is_that_of_full_logits(tmp_path, tiny_dir, monkeypatch):
    """Of two runs: by set and writer, in figures, in coloured texts, and what swapped tokens have to exceed."""
    seen: dict = {"engines": []}

    def texts_of(sets, written, most):
        seen["texts"], seen["written"] = analyze_texts_of(sets, written, most), written
        return seen["texts"]

    class Engine(analyze.CrossEngine):
        def __init__(self, loaded, other, threshold):
            seen["engines"].append((loaded.model.state_dict(), other.model.state_dict(), threshold))
            super().__init__(loaded, other, threshold)

    analyze_texts_of = analyze.texts_of
    monkeypatch.setattr(analyze, "texts_of", texts_of)
    monkeypatch.setattr(analyze, "CrossEngine", Engine)
    models = {"one": moved(tiny_dir, tmp_path / "one", 1, 0.05), "two": moved(tiny_dir, tmp_path / "two", 2, 0.1)}
    result = analysed(tmp_path, str(tiny_dir), str(tmp_path / "one"), str(tmp_path / "two"))
    base = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    texts = seen["texts"]
    lengths = [len(text.tokens) for text in texts]
    of_set, writer = (np.repeat([getattr(text, name) for text in texts], lengths) for name in ("set", "writer"))
    position, target = (np.concatenate(each) for each in ([range(n) for n in lengths], [text.tokens for text in texts]))
    sequences = [text.sequence for text in texts]
    p = logprobs_of(base, sequences).numpy()
    for name, loaded in models.items():
        q, own = logprobs_of(loaded, sequences).numpy(), result["models"][name]
        middle = np.logaddexp(p, q) - math.log(2)
        at = np.arange(len(target)), target
        js = ((np.exp(p) * (p - middle)).sum(1) + (np.exp(q) * (q - middle)).sum(1)) / 2
        change, before = q[at] - p[at], -(np.exp(p) * p).sum(1)
        rank = (p > p[np.arange(len(p)), q.argmax(1)][:, None]).sum(1)
        values = {
            "kl": (np.exp(p) * (p - q)).sum(1),
            "js": js,
            "change": change,
            "changed": np.abs(change) >= math.log(2),
            "entropy_before": before,
            "entropy_after": -(np.exp(q) * q).sum(1),
            "weight_down": np.exp((np.exp(q) * q).sum(1)),
            "weight_up": np.exp(-(np.exp(q) * q).sum(1)),
            "unshifted": rank == 0,
            "marginal": (rank > 0) & (rank < 3),
            "shifted": rank >= 3,
        }
        assert set(own["shift"]) == set(result["sets"])
        for each, writers in own["shift"].items():
            assert {"base", "one", "two"} <= set(writers)
            for one, told in writers.items():
                where = (of_set == each) & (writer == one)
                assert told["tokens"] == where.sum() > 0
                for key, of_tokens in values.items():
                    assert told[key] == pytest.approx(of_tokens[where].mean(), rel=1e-3, abs=1e-5), (each, one, key)
        task = (of_set == "task") & np.isin(writer, ["demonstrations", "base", name])
        of_position = dict(map(tuple, own["by_position"]))
        assert of_position[0.0] == pytest.approx(np.abs(change[task & (position == 0)]).mean(), rel=1e-3)
        order = np.argsort(before[task], kind="stable")
        assert own["by_entropy"][0][1] == pytest.approx(
            np.abs(change[task][order[: -(-len(order) // 8)]]).mean(), rel=0.1
        )
        for title, one in (("demonstrations", "demonstrations"), ("base", "base"), ("own", name)):
            of_writer = change[(of_set == "task") & (writer == one)]
            share = sum(y for x, y in own["histograms"][title] if x > 0) / 4
            assert share == pytest.approx((of_writer >= 0).mean(), abs=1e-6)
        shown = next(text for text in own["texts"] if text["writer"] == name)
        first = next(i for i, text in enumerate(texts) if text.writer == name)
        begin = sum(lengths[:first])
        assert [each for _, each in shown["tokens"]] == pytest.approx(change[begin : begin + lengths[first]], abs=1e-3)
        learned = learnable(seen["written"][name, "task"], Config())
        told = gradients(load_model(ModelConfig(path=str(tmp_path / name / "final"), device="cpu")), learned, 1.0, 2048)
        assert own["gradients"]["rollouts"] == pytest.approx(told.rollouts, rel=1e-3)
        (theirs, others, threshold), back = seen["engines"][:2]
        del seen["engines"][:2]
        exceeded = js[(of_set == "task") & np.isin(writer, ["base", name])]
        assert threshold == back[2] == pytest.approx(np.quantile(exceeded, 0.8), rel=1e-3)
        head = "model.embed_tokens.weight"
        assert torch.equal(theirs[head], base.model.state_dict()[head]) and torch.equal(back[1][head], theirs[head])
        assert torch.allclose(others[head], loaded.model.state_dict()[head])
        by_writer = {each["writer"]: each for each in own["crossing"] if each["swapped"] not in (0.0, 1.0)}
        assert set(by_writer) == {"base", name}


def test_the_map_is_of_tokens_of_all_texts(tmp_path, tiny_dir, monkeypatch):
    """Not of the first ones, which are demonstrations."""
    read = []

    def distances(readings):
        read.extend(readings)
        return real(readings)

    real = analyze.distances
    monkeypatch.setattr(analyze, "distances", distances)
    monkeypatch.setattr(analyze, "MAPPED", 40)
    moved(tiny_dir, tmp_path / "one", 1, 0.05).model.save_pretrained(tmp_path / "one" / "checkpoint-3")
    load_model(ModelConfig(path=str(tiny_dir), device="cpu")).tokenizer.save_pretrained(
        tmp_path / "one" / "checkpoint-3"
    )
    result = analysed(tmp_path, str(tiny_dir), str(tmp_path / "one"))
    assert [(each["model"], each["step"]) for each in result["map"]["points"]] == [
        ("base", None),
        ("one", 3),
        ("one", None),
    ]
    assert 20 < len(read[0].target) <= 40 and all(torch.equal(each.target, read[0].target) for each in read)
    assert read[1].hidden.allclose(read[2].hidden, atol=1e-5), "the checkpoint is the model"
    writers = result["models"]["one"]["shift"]["task"]
    tokens = {name: writers[name]["tokens"] for name in ("demonstrations", "base")}
    step = math.ceil(sum(tokens.values()) / 40)
    assert len(read[0].target) == math.ceil(sum(tokens.values()) / step)


def test_models_whose_heads_are_padded_to_different_sizes(tmp_path, tiny_dir):
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    loaded.model.resize_token_embeddings(264)
    loaded.model.save_pretrained(tmp_path / "padded")
    loaded.tokenizer.save_pretrained(tmp_path / "padded")
    own = analysed(tmp_path, str(tiny_dir), str(tmp_path / "padded"))["models"]["padded"]
    assert own["shift"]["task"]["base"]["kl"] < 1e-5 and own["weights"] is None
    assert len(own["crossing"]) == 6


def test_characters_that_are_several_tokens_are_shown_whole():
    from tests.srft.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokens = tokenizer("x² ≤ 😀!", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == "x² ≤ 😀!"
    assert pieces[:3] == ["x", "", "²"] and pieces[-2:] == ["😀", "!"]
    assert pieces_of(tokenizer, tokens[:2]) == ["x", "\ufffd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["TINY", "TINY", "--analyze.others", "{task = 'gcd', samples = 9}"],
            "analyze.others[1].samples: all sets are",
        ),
        (["smollm2", "nowhere"], "srft analyze 'nowhere': no tokenizer could be loaded"),
        (["TINY", "damaged"], "damaged/model.safetensors: cannot be read"),
        (["smollm2"], "srft analyze takes a base and what was made of it: srft analyze smollm2 RUN_DIR"),
        (["smollm2", "./nowhere"], "./nowhere: expected a directory of a run or of a model"),
        (["smollm2", "TINY"], "its tokenizer is another one than that of smollm2; take models of one"),
        (["TINY", "TINY", "--analyze.prompts", "0"], "analyze.prompts: expected at least 1, found 0"),
        (["TINY", "TINY", "--analyze.others", "{task = 'gdc'}"], "analyze.others[1]: "),
        (["TINY", "TINY", "--analyze.shares", "2"], "analyze.shares: expected"),
        (["TINY", "TINY", "--analyze.dir", "full"], "analyze.dir: full exists and is not empty"),
    ],
)
def test_wrong_inputs_are_told_before_a_model_is_loaded(arguments, message, tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("")
    shutil.copytree(tiny_dir, tmp_path / "damaged")
    (weights,) = (tmp_path / "damaged").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr("srft.analysis.analyze.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["analyze", *(str(tiny_dir) if each == "TINY" else each for each in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_adapters_are_read_as_a_part_of_the_weights(tiny_dir, tmp_path):
    """Also with the settings of the run that trained them: no new ones are put beside them."""
    config = load(None, ["--model.path", str(tiny_dir), "--model.device", "cpu", "--model.lora_rank", "2"])
    checkpoint.save(load_model(config.model), tmp_path / "adapter")
    settings = types.SimpleNamespace(config=config)
    for path in (tiny_dir, tmp_path / "adapter"):
        loaded = analyze.Analysis.load(settings, str(path))
        names = [name for name, weight in loaded.model.named_parameters() if weight.requires_grad]
        assert loaded.adapters is None and len(names) == len(list(tiny_model().named_parameters()))
