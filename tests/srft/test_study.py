"""A study: which runs it has, in which order, and how it goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from srft.errors import UserError
from srft.rundir import read_status
from srft.settings import load
from srft.study import load_study, run_study

JOB = """
[model]
path = "{model}"
device = "cpu"
[data]
size = 40
[rollout]
max_new_tokens = 4
[train]
steps = 2
prompts_per_step = 2
[eval]
prompts = 2
samples = 1
"""


@pytest.fixture
def study_file(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(study: str, job: str = JOB) -> str:
        (tmp_path / "mine.toml").write_text(study + job.replace("{model}", str(tiny_dir)))
        return "mine.toml"

    return write


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


def test_a_study_runs_all_and_then_nothing(study_file, tmp_path, capfd):
    file = study_file('[study]\nrecipes = ["sft", "grpo"]')
    assert run_study(load_study(file)) == []
    for name in ("sft-0", "grpo-0"):
        directory = tmp_path / "runs" / "mine" / name
        assert (
            read_status(directory)["state"] == "finished"
            and load(str(directory / "config.toml")).loss.preset == name[:-2]
        )
    written = (tmp_path / "runs/mine/sft-0/metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert run_study(load_study(file)) == []
    assert capfd.readouterr().out.splitlines() == [
        "sft-0 (1 of 2): finished before",
        "grpo-0 (2 of 2): finished before",
    ]
    assert (tmp_path / "runs/mine/sft-0/metrics.jsonl").read_bytes() == written
    with pytest.raises(UserError, match=r"sft-0.toml: the study was begun with other settings"):
        run_study(load_study(file, ["--train.steps", "3"]))


def test_a_run_that_fails_does_not_stop_the_others(study_file, tmp_path, capfd):
    bad = '[study.variants.bad]\nrecipe = "grpo"\nrollout = {per_prompt = 1}\n'
    (failed,) = run_study(load_study(study_file(bad + '[study.variants.good]\nrecipe = "sft"\n')))
    assert failed.method == "bad" and "bad-0 (1 of 2): failed with exit code 2" in capfd.readouterr().err
    assert read_status(tmp_path / "runs/mine/good-0")["state"] == "finished"


def test_a_stopped_study_goes_on(study_file, tmp_path):
    job = JOB.replace("steps = 2", "steps = 60") + "[run]\ncheckpoint_every = 100\n"
    file = study_file('[study]\nrecipes = ["sft"]\n', job)
    command = [sys.executable, "-m", "srft", "study", file]
    log = tmp_path / "runs/mine/sft-0/metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, told
    done = read_status(log.parent)["step"]
    assert 2 < done < 60 and read_status(log.parent)["state"] == "interrupted"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"going on after step {done}" in again.stdout, again.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 61))
