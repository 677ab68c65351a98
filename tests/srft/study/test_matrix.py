"""A study: which runs it has, and in which order."""

import sys
from pathlib import Path

import pytest

from srft.benchmarks import load_sets
from srft.errors import UserError
from srft.study import load_study

ROOT = Path(__file__).resolve().parents[3]

VARIANT = """
[study.variants.plus]
recipe = "srft_paper"
loss = {options = {entropy_sign = 1}}
"""


def test_the_runs_of_a_study_and_their_order(study_file):
    study = load_study(
        study_file('[study]\nmethods = ["sft", "sft_grpo"]\nseeds = [0, 3]' + VARIANT), ["--train.lr", "1e-3"]
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
        ("", r"mine.toml: expected a table \[study\] with methods"),
        ("[study]\n", "mine.toml: study: nothing to run: name methods, or give variants"),
        ('[study]\nmethod = ["sft"]', "mine.toml: study: unknown key 'method'; did you mean 'methods'"),
        ('[study]\nmethods = "sft"', "mine.toml: study.methods: expected a list of names of recipes"),
        ("[study]\nmethods = [3]", "mine.toml: study.methods: expected names of recipes and variants, found 3"),
        ('[study]\nmethods = ["stf"]', "mine.toml: study: recipe 'stf' is not known; did you mean 'sft'"),
        (
            '[study]\nmethods = ["sft"]\ndir = "runs/{time}"',
            "mine.toml: study.dir: expected the name of a directory that",
        ),
        ('[study]\nmethods = ["sft"]\ndir = ""', "mine.toml: study.dir: expected the name of a directory that stays"),
        ('[study]\nmethods = ["sft"]\ndir = "mine.toml"', "mine.toml: study.dir: mine.toml is no directory"),
        ('[study]\nmethods = ["sft"]\ndir = "mine.toml/x"', "mine.toml: study.dir: mine.toml is no directory"),
        ('[study]\nmethods = ["sft"]\ndir = "~nobody-here/x"', "mine.toml: study.dir: '~nobody-here/x': there is no"),
        ('[study]\nmethods = ["sft"]\nlaunch = "a \'b"', "mine.toml: study.launch: expected a command, such as"),
        ('[study]\nmethods = ["sft"]\nlaunch = "nosuch -m"', "mine.toml: study.launch: there is no command 'nosuch'"),
        ('[study.variants."{time}"]\nrecipe = "sft"', "a name is part of a directory's"),
        ('[study.variants.base]\nrecipe = "sft"', "study: 'base' is the model as it is"),
        ('[study.variants.""]\nrecipe = "sft"', "a name is part of a directory's"),
        ('[study.variants."a\\nb"]\nrecipe = "sft"', "a name is part of a directory's"),
        ('[study]\nmethods = ["pluss"]' + VARIANT, "study: method 'pluss' is not known; did you mean 'plus'"),
        ('[study]\nmethods = ["sft"]\n[run]\ndir = "x"', "mine.toml: run.dir: each run of a study has its own"),
        ("[study.variants.a]\ntrain = {seed = 3}", "study.variants.a: train.seed: each run of a study has its own"),
        ("[study.variants.a]\nseeds = []", "mine.toml: study.variants.a.seeds: expected different whole numbers"),
        ("[study.variants.a]\nseeds = 0", "mine.toml: study.variants.a.seeds: expected different whole numbers"),
        ('[study]\nmethods = ["sft", "sft"]', "mine.toml: study.methods: 'sft' is there twice"),
        ('[study]\nmethods = ["sft"]\nseeds = [0, 0]', "mine.toml: study.seeds: expected different whole numbers"),
        ('[study]\nmethods = ["sft"]\nseeds = ["a"]', "mine.toml: study.seeds: expected different whole numbers"),
        ("[study.variants]\na = 3", "mine.toml: study.variants.a: expected a table with recipe"),
        ("[study.variants.a]\nloss = {presett = 3}", r"unknown key 'loss.presett'"),
        ("[study.variants.a]\nloss = {average = 'x'}", r"loss.average: expected one of token.* \(of a in mine.toml\)"),
    ],
)
def test_what_is_no_study_is_refused(study_file, study, message):
    with pytest.raises(UserError, match=message):
        load_study(study_file(study))


def test_a_study_like_another(study_file, tmp_path):
    (tmp_path / "studies").mkdir()
    study_file('[study]\nmethods = ["sft", "grpo"]\nseeds = [0, 3]\ndir = "elsewhere"' + VARIANT)
    (tmp_path / "mine.toml").rename(tmp_path / "studies" / "first.toml")
    like = tmp_path / "studies" / "other.toml"
    like.write_text('[study]\nlike = "first.toml"\nseeds = [1]\n[train]\nlr = 1e-3\n[rollout]\nper_prompt = 3')
    study = load_study("studies/other.toml")
    assert [trial.directory.as_posix() for trial in study.trials] == [
        "runs/other/sft-1", "runs/other/grpo-1", "runs/other/plus-1",
    ]  # fmt: skip
    config = study.trials[0].config
    assert (config.train.lr, config.train.steps) == (1e-3, 2)
    assert (config.rollout.per_prompt, config.rollout.max_new_tokens) == (3, 4)
    own = '[study]\nlike = "first.toml"\nmethods = ["sft"]\nseeds = [0]\n'
    like.write_text(own + "[study.variants]\nmore = {train = {steps = 9}}")
    trials = load_study("studies/other.toml").trials
    assert [(each.method, each.config.train.steps) for each in trials] == [("sft", 2), ("more", 9)]
    like.write_text(own.replace('"sft"', '"plus", "sft"'))
    trials = load_study("studies/other.toml").trials
    assert [(each.method, each.config.loss.options) for each in trials] == [("plus", {"entropy_sign": 1}), ("sft", {})]
    like.write_text('[study]\nlike = "first.toml"\nmethods = ["sft"]\n[trian]\nlr = 1')
    with pytest.raises(UserError, match=r"studies/other.toml: unknown section \[trian\]; did you mean 'train'"):
        load_study("studies/other.toml")
    like.write_text('[study]\nlike = "other.toml"')
    with pytest.raises(UserError, match=r"other.toml: study.like: other.toml is like this one"):
        load_study("studies/other.toml")
    like.write_text('[study]\nlike = "absent.toml"')
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        load_study("studies/other.toml")


def test_a_directory_that_a_link_does_not_lead_to_is_refused(study_file, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"mine.toml: study.dir: runs is no directory"):
        load_study(study_file('[study]\nmethods = ["sft"]'))


@pytest.mark.parametrize("key", ["train.seed", "data.seed", "run.dir"])
def test_what_each_run_has_of_its_own_is_not_overridden(study_file, key):
    with pytest.raises(UserError, match=f"--{key}: each run of a study has its own"):
        load_study(study_file('[study]\nmethods = ["sft"]'), [f"--{key}", "3"])


def test_what_makes_a_method_what_it_is_is_not_overridden(study_file):
    file = study_file("[study.variants.longer]\ntrain = {steps = 9}\n" + VARIANT)
    with pytest.raises(UserError, match=r"--train.steps: longer has its own; write it into study.variants, mine"):
        load_study(file, ["--train.steps", "3"])
    with pytest.raises(UserError, match=r"--loss.options.level: plus has its own"):
        load_study(file, ["--loss.options.level=batch"])
    assert load_study(file, ["--train.lr", "1"]).trials[0].config.train.lr == 1


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_of_this_repository(file):
    study = load_study(str(file))
    assert [each.directory.name for each in study.trials][:2] == ["base", "srft_paper-0"]
    assert study.directory.as_posix() == f"runs/{file.stem}"
    assert load_sets(study.trials[0].config)
