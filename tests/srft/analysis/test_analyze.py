import json

import pytest
import torch

from srft.cli import main
from srft.config import ModelConfig
from srft.model import load_model
from tests.srft.analysis.conftest import ROW

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
            assert not any(own[key] for key in ("kl", "js", "change", "changed", "raised", "marginal", "shifted"))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
    monkeypatch.setattr("srft.analysis.analyze.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["analyze", *(str(tiny_dir) if each == "TINY" else each for each in arguments)]) == 2
    assert message in capsys.readouterr().err
