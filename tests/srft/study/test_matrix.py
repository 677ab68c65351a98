"""A study: which runs it has, and in which order."""

import sys

import pytest

from srft.errors import UserError
from srft.study import load_study

VARIANT = """
[study.variants.plus]
recipe = "srft_paper"
loss = {options = {entropy_sign = 1}}
"""


def test_the_runs_of_a_study_and_their_order(study_file):
    study = load_study(
        study_file('[study]\nrecipes = ["sft", "sft_grpo"]\nseeds = [0, 3]' + VARIANT), ["--train.lr", "1e-3"]
    )
    names = [trial.directory.name for trial in study.trials]
    assert names == ["sft-0", "sft_grpo-0", "sft-3", "sft_grpo-3", "plus-0", "plus-3"]
    assert [(t.config.train.seed, t.config.data.seed) for t in study.trials] == [
        (0, 0),
        (0, 0),
        (3, 3),
        (3, 3),
        (0, 0),
        (3, 3),
    ]
    assert (
        study.trials[4].config.loss.options == {"entropy_sign": 1}
        and study.trials[1].config.train.stages[1]["name"] == "grpo"
    )
    assert {t.config.train.lr for t in study.trials} == {1e-3} and {t.config.train.steps for t in study.trials} == {2}
    assert str(study.directory) == "runs/mine" and study.launch == [sys.executable, "-m", "srft"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("", r"mine.toml: expected a table \[study\] with recipes"),
        ("[study]\n", "mine.toml: study: nothing to run: name recipes or variants"),
        ('[study]\nrecipe = ["sft"]', "mine.toml: study: unknown key 'recipe'; did you mean 'recipes'"),
        ('[study]\nrecipes = "sft"', "mine.toml: study.recipes: expected a list of names of recipes, found 'sft'"),
        ('[study]\nrecipes = ["stf"]', "recipe 'stf' is not known; did you mean 'sft'"),
        ('[study]\nrecipes = ["sft", "sft"]', "mine.toml: study: 'sft' is there twice"),
        ('[study]\nrecipes = ["sft"]\nseeds = [0, 0]', "mine.toml: study.seeds: expected different whole numbers"),
        ('[study]\nrecipes = ["sft"]\nseeds = ["a"]', "mine.toml: study.seeds: expected different whole numbers"),
        ("[study.variants]\na = 3", "mine.toml: study.variants.a: expected a table with recipe"),
        ("[study.variants.a]\nloss = {presett = 3}", r"unknown key 'loss.presett'"),
        ("[study.variants.a]\nloss = {average = 'x'}", r"loss.average: expected one of token.* \(of a in mine.toml\)"),
    ],
)
def test_what_is_no_study_is_refused(study_file, study, message):
    with pytest.raises(UserError, match=message):
        load_study(study_file(study))
