"""From reward.name to a scorer, and what is refused before a model is loaded."""

import json
import sys

import pytest

from srft.cli import main
from srft.config import DataConfig, RewardConfig
from srft.data import build_prompter
from srft.errors import UserError
from srft.rewards import Scorer, build_reward, check_answers
from srft.settings import load, to_toml
from tests.srft.conftest import byte_tokenizer
from tests.srft.rewards.conftest import FILE, example


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("exakt", FILE, "reward.name: expected auto, exact, math_verify, reasoning_gym, package.module:function or "),
        ("reasoning_gym", FILE, "reward.name: 'reasoning_gym' scores generated tasks, not data.train_file"),
        (
            "no_such_module:f",
            FILE,
            "reward.name 'no_such_module:f': importing 'no_such_module' raised ModuleNotFoundError: ",
        ),
        ("math:sqroot", FILE, "reward.name 'math:sqroot': math has no function 'sqroot'; did you mean 'sqrt'?"),
        ("math:pi", FILE, "reward.name 'math:pi': math has no function 'pi', it is of type float"),
        ("math:inff", FILE, "reward.name 'math:inff': math has no function 'inff'; did you mean 'isinf'?"),
        ("rw:", FILE, "reward.name: expected package.module:function or file.py:function, found 'rw:'"),
        (":f", FILE, "reward.name: expected package.module:function or file.py:function, found ':f'"),
        ([], FILE, "reward.name: expected at least one name, found none"),
        (["exact", "exact"], FILE, "reward.name: 'exact' is there twice; give it a larger weight in reward.weights"),
    ],
)
def test_wrong_names(name, data, expected):
    with pytest.raises(UserError) as error:
        build_reward(RewardConfig(name), data)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], r"reward\.weights: expected one number per function of reward\.name, found 1 for 2 functions"),
        ([1.0, float("nan")], r"reward\.weights: expected a finite number, found nan"),
    ],
)
def test_wrong_weights(weights, expected):
    with pytest.raises(UserError, match=expected):
        build_reward(RewardConfig(["exact", "math:sqrt"], weights=weights), FILE)


def test_one_name_or_several_from_the_command_line_and_from_a_file(tmp_path):
    assert load(None, ["--reward.name", "exact"]).reward.name == "exact"
    several = load(None, ["--reward.name", "exact", "a.py:f", "--reward.weights", "1", "0.5"])
    assert several.reward.name == ["exact", "a.py:f"] and several.reward.weights == [1.0, 0.5]
    (tmp_path / "c.toml").write_text(to_toml(several), encoding="utf-8")
    assert load(str(tmp_path / "c.toml")) == several
    with pytest.raises(UserError, match=r"reward\.weights: expected a list of numbers, found \['much'\]"):
        load(None, ["--reward.weights", "much"])
    with pytest.raises(UserError, match=r"reward\.name: expected text or a list of texts, found 3"):
        (tmp_path / "c.toml").write_text("[reward]\nname = 3")
        load(str(tmp_path / "c.toml"))


@pytest.mark.parametrize("data", [DataConfig(), FILE, DataConfig(system_prompt="x"), DataConfig(system_prompt="")])
def test_the_system_prompt_that_a_mark_is_looked_for_in_is_the_one_that_the_model_gets(data):
    told = build_reward(RewardConfig("exact"), data).rewards[0].rule.system_prompt
    assert told == build_prompter(byte_tokenizer(), data).system_prompt


def test_a_file_without_answers_is_refused_and_one_with_some_warns(capsys):
    exact, own = build_reward(RewardConfig("exact"), FILE), Scorer("own", lambda prompts, completions: [])
    misspelt = [example(answers="4", level=1), example(answers="5", level=1)]
    expected = (
        "train.jsonl: reward.name 'exact' compares with the column 'answer', which no row has; found besides the "
        "prompt: answers, level, demonstration; did you mean 'answers'? (rename it, or take another reward.name)"
    )
    for given in ((misspelt, []), ([example("4")], misspelt)):
        with pytest.raises(UserError) as error:
            check_answers(exact, FILE, *given)
        assert str(error.value) == expected
    with pytest.raises(UserError, match=r"^held\.jsonl: "):
        check_answers(exact, DataConfig(train_file="train.jsonl", eval_file="held.jsonl"), misspelt)
    check_answers(own, FILE, misspelt, misspelt)
    check_answers(exact, FILE, [example("4")], [example("4")] * 3)
    assert capsys.readouterr().err == ""
    check_answers(exact, FILE, [example("4")], [example("4"), example(""), example()])
    told = capsys.readouterr().err
    assert told.startswith("warning: train.jsonl: ") and told.endswith("2 of 3 rows drawn lack it and are not scored\n")


@pytest.mark.parametrize(
    ("function", "rows", "expected"),
    [
        (
            lambda prompts, completions, levels: [],
            [example("4", level=1)],
            "train.jsonl: reward.name 'own' names the column 'levels', which no row has; found besides the prompt: "
            "level, demonstration, answer; did you mean 'level'?",
        ),
        (lambda completions, answer, **kwargs: [], [example(level=1)], "names the column 'answer', which no row has"),
        (lambda solution_str, ground_truth: 0, [example(level=1)], "names the column 'ground_truth', which no row has"),
        (lambda data_source, solution_str, level: 0, [example("4")], "names the column 'level', which no row has"),
        (
            lambda completions, finished: [],
            [example("4", finished=True)],
            "gets 'finished' from srft, but the data has such a column too; rename it there",
        ),
        (lambda completions, **kwargs: [], [example("4", task="x")], "gets 'task' from srft, but the data has"),
    ],
)
def test_columns_that_do_not_exist_or_are_srfts_own_are_refused(function, rows, expected):
    for given in ((rows, []), ([], rows)):
        with pytest.raises(UserError) as error:
            check_answers(Scorer("own", function), FILE, *given)
        assert expected in str(error.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions, level=1: [],
        lambda completions, answer, task, demonstration, finished, completion_ids: [],
        lambda data_source, solution_str, ground_truth, extra_info: 0,
        lambda solution_str, ground_truth, extra_info=None, **kwargs: 0,
        lambda prompts, completions, **columns: [],
    ],
)
def test_columns_that_exist_or_have_a_default_are_not_refused(function):
    check_answers(Scorer("own", function), FILE, [example("4")], [example("4", finished_=1)])


OF_TRL = """
def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]

async def level(prompts, completions, level, completion_ids, **kwargs):
    assert len(prompts) == len(completion_ids) == len(level)
    return [float(each) for each in level]
"""


def test_rewards_of_trl_train_a_model_from_a_file(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "rewards.py").write_text(OF_TRL)
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "level": i} for i in range(16)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"--model.path {tiny_dir} --model.device cpu --data.train_file d.jsonl --run.dir run --train.steps 1 "
        "--train.prompts_per_step 2 --rollout.max_new_tokens 4 --eval.prompts 2 --eval.samples 1 --loss.preset grpo "
        "--reward.name rewards.py:length rewards.py:level --reward.weights 1 0.5 --reward.conversational"
    ).split()
    assert main(["train", *settings]) == 0, capsys.readouterr().err
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["reward_mean"] == pytest.approx(line["reward/length"] + 0.5 * line["reward/level"])
    assert line["reward_failed"] == 0.0
    with pytest.raises(UserError, match=r"d\.jsonl: reward\.name 'rewards\.py:level' names the column 'level'"):
        rows = "".join(json.dumps({"prompt": f"{i} + 1?", "levels": i}) + "\n" for i in range(16))
        (tmp_path / "d.jsonl").write_text(rows)
        main(["train", *settings, "--run.dir", "another", "--model.path", "not looked for", "--debug"])
