"""What is kept of a run, from its directory."""

import json
import math

import pytest

from srft.errors import UserError
from srft.rundir import write_status
from srft.settings import load, to_toml
from srft.study.record import read_record, record_of, rounded, written
from tests.srft.study.records import a_record, a_set


def generation(*rewards: float | None, name: str = "") -> dict:
    own = {"set": name} if name else {}
    return {**own, "rewards": list(rewards), "finished": [True] * len(rewards), "tokens": [2] * len(rewards)}


def evaluation(step: int, *generations: dict) -> dict:
    samples = len(generations[0]["rewards"]) if generations else 0
    return {"step": step, "on": "here", "samples": samples, "reward": 0.5, "loss": None, "generations": generations}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path):
    """A run of two steps that finished."""
    directory = tmp_path / "mine-3"
    directory.mkdir()
    config = load(None, ["--train.seed", "3", "--train.steps", "2", "--reward.mark", "any"])
    (directory / "config.toml").write_text(to_toml(config))
    (directory / "metrics.jsonl").write_text(lines({"step": 1, "loss": 1 / 3}, {"step": 2, "loss": None}))
    rows = evaluation(0, generation(0, 0)), evaluation(2, generation(1, 0.5), generation(1, None))
    (directory / "evaluation.jsonl").write_text(lines(*rows))
    (directory / "origin.json").write_text('{"commit": "abc"}')
    write_status(directory, "finished", 2, 2)
    return directory


def test_of_a_run(run):
    found = record_of(run)
    assert (found["method"], found["seed"], found["origin"]) == ("mine", 3, {"commit": "abc"})
    (run / "data.json").write_text('{"files": "abc"}')
    assert record_of(run)["origin"] == {"commit": "abc", "files": "abc"}
    assert found["steps"] == [{"step": 1, "loss": 0.33333}, {"step": 2, "loss": None}]
    assert [each["step"] for each in found["curve"]] == [0, 2] and found["settings"]["train"]["steps"] == 2
    (held_out,) = found["sets"]
    assert held_out["rewards"] == [[1, 0.5], [1, None]] and held_out["samples"] == 2  # not scored is not wrong
    assert held_out["on"] == "here auto [] any"  # graded by that


def test_sets_come_before_held_out_prompts_and_what_could_not_be_graded_is_wrong(run):
    (run / "eval").mkdir()
    scores = {"sets": [{"set": "sums", "group": "g", "on": "there", "samples": 2, "prompts": 2}]}
    (run / "eval" / "scores.json").write_text(json.dumps(scores))
    rows = [generation(1, None, name="sums"), generation(0, 0, name="sums"), generation(1, name="x")]
    (run / "eval" / "generations.jsonl").write_text(lines(*rows))
    (found,) = record_of(run)["sets"]
    assert (found["name"], found["group"], found["on"]) == ("sums", "g", "there any")
    assert found["rewards"] == [[1, 0], [0, 0]]
    for lost in (rows[1:], [generation(1, name="sums"), *rows[1:]]):  # else the others would move to its place
        (run / "eval" / "generations.jsonl").write_text(lines(*lost))
        with pytest.raises(UserError, match=r"damaged.* has not 2 completions of each of 2 prompts of sums"):
            record_of(run)
    (run / "eval" / "scores.json").write_text('{"reward": 0.5}')  # of held-out prompts, by hand
    assert record_of(run)["sets"][0]["name"] == "held-out"


def test_an_evaluation_before_the_end_is_no_result(run):
    (run / "evaluation.jsonl").write_text(lines(evaluation(0, generation(0)), evaluation(1, generation(1))))
    assert record_of(run)["sets"] == [] and len(record_of(run)["curve"]) == 2


def test_of_a_base(tmp_path):
    measured = tmp_path / "base" / "eval"
    measured.mkdir(parents=True)
    (measured / "config.toml").write_text(to_toml(load(None, [])))
    (measured / "scores.json").write_text(
        '{"sets": [{"set": "a", "group": "g", "on": "o", "samples": 1, "prompts": 1}]}'
    )
    (measured / "generations.jsonl").write_text(lines(generation(1, name="a")))
    found = record_of(tmp_path / "base")
    assert found["method"] == "base" and found["steps"] == [] and found["sets"][0]["rewards"] == [[1]]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("status.json", '{"state": "running", "step": 1}', "the run is running, after step 1; let it finish"),
        ("status.json", "[1]", "mine-3: the run is damaged, after step 0"),
        ("origin.json", "{", "mine-3: the run's files are damaged"),
        ("metrics.jsonl", '{"step": 1}', "mine-3: metrics.jsonl has 1 of the run's 2 steps"),
        ("evaluation.jsonl", '{"step": 2}', "mine-3: the run's files are damaged: KeyError: 'generations'"),
        ("config.toml", "[train]\nstep = 1", "unknown key 'train.step'"),
    ],
)
def test_a_damaged_run_is_told_as_such(run, file, text, message):
    (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        record_of(run)


def test_a_run_called_base_is_refused(run):
    run.rename(run.with_name("base-3"))
    with pytest.raises(UserError, match="base is the model as it was; give the directory of the run another name"):
        record_of(run.with_name("base-3"))


def test_a_record_comes_back_from_its_file(tmp_path):
    record = a_record("sft", 1, [a_set("sums", [[1, 0.5]])])
    (tmp_path / "sft-1.json").write_text(written(record))
    assert read_record(tmp_path / "sft-1.json") == json.loads(json.dumps(record))
    (tmp_path / "none.json").write_text(written({**record, "steps": [], "sets": []}))
    assert read_record(tmp_path / "none.json")["steps"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "../x"}, r"method: it names a file, and '../x' is no name of one"),
        ({"seed": None}, "seed: expected int, found None"),
        ({"method": "a\nb"}, r"method: it names a file, and 'a.+nb' is no name of one"),
        ({"seed": True}, "seed: expected int, found True"),
        ({"seed": 4}, "seed: 4, and train.seed of its settings is 1"),
        ({"sets": [3]}, r"sets\[1\]: expected an object, found 3"),
        ({"sets": [{"name": "a", "group": "", "on": "", "rewards": []}]}, "samples: expected int, found None"),
        ({"sets": [a_set("a", [[1, 0]]) | {"samples": 9}]}, "rewards of a: expected 9 numbers or nulls for each"),
        ({"sets": [a_set("a", [[1, math.nan]])]}, "rewards of a: expected 2 numbers"),
        ({"sets": [a_set("a", [["1"]])]}, "rewards of a: expected 1 numbers"),
        ({"sets": [a_set("a", [[1.0]]) | {"rewards": [1]}]}, "rewards of a: expected 1 numbers"),
        ({"settings": {}}, "settings: train: expected dict, found None"),
        ({"steps": [3]}, r"steps\[1\]: expected an object, found 3"),
        ({"curve": [{}]}, r"curve\[1\]: step: expected int, found None"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, changes, message):
    (tmp_path / "a.json").write_text(json.dumps({**a_record("sft", 1, []), **changes}))
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "a.json")


def test_numbers_are_kept_to_five_digits():
    assert rounded([1 / 3, 123456.78, 2.0, {"a": 1e-7 / 3}, True, "x"]) == [
        0.33333, 123460.0, 2, {"a": 3.3333e-08}, True, "x",
    ]  # fmt: skip
