"""The runs of a study, and how it goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srft.errors import UserError
from srft.rundir import read_status, write_status
from srft.settings import load, to_toml
from srft.signals import Interrupted
from srft.study import load_study, main_compare, run_study, runs
from srft.study.runs import check_unchanged
from tests.srft.study.conftest import JOB

SETS = '[{task = "chain_sum", prompts = 3, samples = 2}, {task = "products", prompts = 2, group = "others"}]'


def test_a_study_runs_all_and_then_nothing(study_file, tmp_path, capfd):
    file = study_file('[study]\nmethods = ["sft", "grpo"]')
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
    with pytest.raises(UserError, match=r"sft-0.toml: begun with train.steps 2, now it is 3; put it back"):
        run_study(load_study(file, ["--train.steps", "3"]))


def test_a_run_that_fails_does_not_stop_the_others(study_file, tmp_path, capfd):
    bad = '[study.variants.bad]\nrecipe = "grpo"\nrollout = {per_prompt = 1}\n'
    (failed,) = run_study(load_study(study_file(bad + '[study.variants.good]\nrecipe = "sft"\n')))
    assert failed.method == "bad" and "bad-0 (1 of 2): failed with exit code 2" in capfd.readouterr().err
    assert read_status(tmp_path / "runs/mine/good-0")["state"] == "finished"


def test_runs_that_were_begun_otherwise_are_refused_before_anything_runs(study_file, tmp_path):
    """By what the settings are, not by how they were written; also where a run was put there by hand."""
    file = study_file('[study]\nmethods = ["sft"]')
    (trial,) = load_study(file).trials
    trial.settings.parent.mkdir(parents=True)
    trial.settings.write_text("# of another version\n" + to_toml(trial.config))
    check_unchanged([trial])
    trial.directory.mkdir()
    other = load(None, ["--train.steps", "9", "--run.dir", str(trial.directory)])
    (trial.directory / "config.toml").write_text(to_toml(other))
    with pytest.raises(UserError, match=r"sft-0/config.toml: begun with model.path 'smollm2', now it is"):
        run_study(load_study(file))


def test_steps_that_follow_from_epochs_are_no_other_settings(study_file):
    file = study_file('[study]\nmethods = ["sft"]', JOB.replace("steps = 2", "epochs = 1"))
    (trial,) = load_study(file).trials
    trial.directory.mkdir(parents=True)
    resolved = load_study(file).trials[0].config
    resolved.train.steps, resolved.train.epochs = 20, 0.0
    (trial.directory / "config.toml").write_text(to_toml(resolved))
    check_unchanged([trial])


def test_a_run_that_left_no_checkpoint_is_made_again_and_the_study_then_goes_on(study_file, tmp_path):
    """Twice the same study: what the second start says about what the first left is not held against the third."""
    file = study_file('[study]\nmethods = ["sft"]')
    (trial,) = load_study(file).trials
    trial.directory.mkdir(parents=True)
    (trial.directory / "metrics.jsonl").write_text('{"step": 1}\n')
    write_status(trial.directory, "running", 1, 2)
    assert run_study(load_study(file)) == [] and (trial.directory / "previous-1" / "metrics.jsonl").exists()
    assert run_study(load_study(file)) == []


def test_a_run_that_was_interrupted_before_and_fails_now_does_not_stop_the_others(study_file, tmp_path, monkeypatch):
    file = study_file('[study]\nmethods = ["sft", "grpo"]')
    study, commands = load_study(file), []
    monkeypatch.setattr(runs, "completed", lambda command, title: commands.append(command) or 2)
    first = study.trials[0].directory
    first.mkdir(parents=True)
    write_status(first, "interrupted", 1, 2, "SIGTERM")
    assert run_study(study) == study.trials and len(commands) == 2
    monkeypatch.setattr(runs, "completed", lambda command, title: 128 + signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_study(study)


def test_what_no_run_could_do_is_told_before_the_first(study_file, tmp_path):
    job = JOB.replace("[eval]", '[eval]\nsets = ["nowhere.jsonl"]')
    with pytest.raises(UserError, match=r"nowhere.jsonl"):
        run_study(load_study(study_file('[study]\nmethods = ["sft"]', job)))
    bad = '[study.variants.bad]\nloss = {preset = "sfft"}\n'
    with pytest.raises(UserError, match=r"loss.preset: expected one of .*; did you mean 'sft'\? \(of bad\)"):
        run_study(load_study(study_file('[study]\nmethods = ["sft"]\n' + bad)))
    assert not (tmp_path / "runs").exists()


def test_where_the_model_cannot_be_measured_nothing_is_trained(study_file, tmp_path, monkeypatch, capfd):
    file = study_file('[study]\nmethods = ["sft"]', JOB.replace("[eval]", f"[eval]\nsets = {SETS}"))
    monkeypatch.setattr(runs, "completed", lambda command, title: 2)
    assert [each.method for each in run_study(load_study(file))] == ["base"]
    assert "the model could not be measured, so no run could be; stopped" in capfd.readouterr().err


def test_data_files_that_have_changed_are_refused(study_file, tmp_path):
    """A second seed on other demonstrations would be taken for a second seed."""
    rows = [{"prompt": f"{n} + 1", "demonstration": f"{n + 1}", "answer": f"{n + 1}"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = JOB.replace("size = 40", 'train_file = "a.jsonl"')
    assert run_study(load_study(study_file('[study]\nmethods = ["sft"]', job))) == []
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    study = load_study(study_file('[study]\nmethods = ["sft"]\nseeds = [0, 1]', job))
    assert main_compare(["runs/mine"]).methods["sft"].runs.keys() == {0}
    with pytest.raises(UserError, match=r"sft-0: begun with other data files \([0-9a-f]{16}, now [0-9a-f]{16}\)"):
        run_study(study)
    (tmp_path / "a.jsonl").unlink()
    assert list(main_compare(["mine.toml"]).methods) == ["sft"]  # what has been run is there to be compared
    (tmp_path / "runs/mine/sft-0/data.json").write_text("{")
    with pytest.raises(UserError, match=r"sft-0: the run's files are damaged: data.json"):
        main_compare(["mine.toml"])


def test_an_evaluation_that_left_a_set_out_is_made_again(study_file, tmp_path, monkeypatch, capfd):
    file = study_file('[study]\nmethods = ["sft"]', JOB.replace("[eval]", f"[eval]\nsets = {SETS}"))
    base = load_study(file).trials[0]

    def evaluated(command, title, left_out=True):
        directory = Path(command[command.index("--eval.dir") + 1])
        directory.mkdir()
        (directory / "scores.json").write_text(json.dumps({"sets": []} | ({"left_out": ["x"]} if left_out else {})))
        return 0

    monkeypatch.setattr(runs, "completed", evaluated)
    assert not runs.measures(base, "base") and not base.measured
    monkeypatch.setattr(runs, "completed", lambda *each: evaluated(*each, left_out=False))
    assert runs.measures(base, "base") and base.measured and (base.directory / "eval-1").is_dir()


def test_a_stopped_study_goes_on_and_gives_the_same_table(study_file, tmp_path):
    job = JOB.replace("steps = 2", "steps = 60").replace("[eval]", f"[eval]\nsets = {SETS}")
    file = study_file('[study]\nmethods = ["sft"]\n', job + "[run]\ncheckpoint_every = 100\n")
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
    # the base was measured, which is something to look at already
    with pytest.raises(UserError, match="there is no run to compare: none has finished"):
        main_compare([file])

    (log.parent / "eval-1").mkdir()  # an evaluation that was killed
    (log.parent / "eval-1" / "generations.jsonl").write_text('{"set": "chain_sum"}')
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"going on after step {done}" in again.stdout, again.stderr
    assert "base (1 of 2): finished before" in again.stdout
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 61))
    aside = log.parent / "previous-1" / "eval-1" / "generations.jsonl"
    assert aside.read_text() == '{"set": "chain_sum"}'

    straight = tmp_path / "straight.toml"
    straight.write_text((tmp_path / file).read_text())
    assert run_study(load_study("straight.toml")) == []
    tables = []
    for each in (file, "straight.toml"):
        main_compare([each])
        numbers = json.loads((tmp_path / "runs" / each[:-5] / "comparison/comparison.json").read_text())
        assert numbers["methods"]["sft"].pop("seconds") > 0
        tables.append(numbers)
    assert tables[0] == tables[1] and tables[0]["runs"] == ["base", "sft-0"]
    assert [each["set"] for each in tables[0]["columns"] if each["score"].startswith("avg")] == [
        "chain_sum",
        "products",
    ]
