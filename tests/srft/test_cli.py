"""The command line: help, dispatch, and every wrong input as one message with exit code 2."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import srft.cli
from srft.cli import main
from srft.errors import UserError
from srft.signals import Interrupted

pytest.importorskip("jsonargparse")


@pytest.mark.parametrize(
    "before, environment, expected",
    [
        ("", {}, "10000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import torch", {}, "None"),  # which has read it
    ],
)
def test_threads_spin_shorter_where_nobody_has_said(before, environment, expected):
    script = f"{before}\nimport os, srft.cli\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    others = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=others | environment)
    assert run.stdout.split() == [expected], run.stderr


@pytest.fixture
def rooms(monkeypatch):
    """What the commands would call, recorded."""
    calls = []
    for module, name in [("run", "run"), ("eval", "main_eval"), ("report", "build")]:
        called = type("module", (), {name: staticmethod(lambda *given, name=name: calls.append((name, *given)))})
        monkeypatch.setitem(sys.modules, f"srft.{module}", called)
    return calls


def failure(capsys, *arguments):
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["srft train [CONFIG.toml]", "srft eval", "srft report [--watch] RUN_DIR", "Examples", "--debug"]),
        (
            ["train", "--help"],
            ["--train.lr", "--data.train_file", "def my_function(prompts, completions", '{"prompt":'],
        ),
        (["eval", "--help"], ["--checkpoint", "avg@k"]),
        (["report", "-h"], ["RUN_DIR/report.html", "--watch"]),
        (["analyze", "--help"], ["srft analyze BASE RUN…", "KL(base ‖ model)"]),
    ],
)
def test_help_teaches(arguments, expected, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(each in shown for each in expected)


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "Examples" in capsys.readouterr().out


def test_train(rooms, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nsteps = 3\n")
    assert main(["train", str(file), "--train.lr", "1e-6", "--debug"]) == 0
    (name, config, *_), *_ = rooms
    assert (name, config.train.steps, config.train.lr) == ("run", 3, 1e-6)


def test_eval_of_a_run_takes_its_settings_and_final_checkpoint(rooms, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").touch()
    (tmp_path / "config.toml").write_text("[eval]\nprompts = 5\n")
    for checkpoint in (tmp_path, tmp_path / "final"):
        assert main(["eval", "--checkpoint", str(checkpoint), "--eval.samples", "2"]) == 0
        name, config, given = rooms.pop()
        assert (name, config.eval.prompts, config.eval.samples, given) == ("main_eval", 5, 2, str(tmp_path / "final"))


def test_a_recipe_is_over_the_settings_of_a_run(rooms, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.toml").write_text("[eval]\nsamples = 5\nsets = []\n[rollout]\nmax_new_tokens = 32\n")
    assert main(["eval", "--checkpoint", str(tmp_path), "--recipe", "benchmarks", "--rollout.max_new_tokens", "9"]) == 0
    _, config, _ = rooms.pop()
    assert len(config.eval.sets) == 8 and (config.eval.samples, config.rollout.max_new_tokens) == (1, 9)


def test_recipes_of_training(rooms, tmp_path, capsys):
    (tmp_path / "c.toml").write_text('[loss]\npreset = "chord"\n')
    assert (
        main(["train", str(tmp_path / "c.toml"), "--recipe", "gsm_symbolic", "--recipe=dapo", "--train.lr", "2"]) == 0
    )
    _, config, *_ = rooms.pop()
    assert (config.loss.preset, config.data.tasks, config.train.lr) == ("dapo", ["gsm_symbolic"], 2.0)
    for arguments, told in (
        (["--recipe"], "--recipe: expected the name of a recipe, one of benchmarks, chord, dapo"),
        (["--recipe", "--train.lr", "1"], "--recipe: expected the name of a recipe"),
        (
            ["--recipe", "sft", "grpo"],
            "--recipe: expected one value, found sft grpo; several are --recipe sft --recipe",
        ),
        (
            ["--train.stages.0.train.lr", "1"],
            "--train.stages.0.train.lr: train.stages is a list and has no keys of its",
        ),
        (["--recipe", "dappo"], "recipe 'dappo' is not known; did you mean 'dapo'"),
        (["--resume", "x", "--recipe", "dapo"], "--resume takes the settings from the run, found --recipe dapo too"),
    ):
        assert main(["train", *arguments]) == 2 and told in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "  sft_grpo         SFT → RL: half of the steps on demonstrations" in capsys.readouterr().out


def test_eval_without_a_checkpoint(rooms):
    assert main(["eval", "--model.path", "x"]) == 0
    _, config, given = rooms.pop()
    assert (config.model.path, given) == ("x", None)
    assert main(["eval", "--checkpoint=org/name"]) == 0
    assert rooms.pop()[2] == "org/name"


def test_report(rooms, tmp_path):
    assert main(["report", str(tmp_path)]) == 0
    assert rooms == [("build", tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["trian"],
            "srft: error: unknown command 'trian'; did you mean 'train'? (commands: train, eval, data, study, c",
        ),
        (["train", "none.toml"], "srft: error: none.toml: cannot be read as a configuration"),
        (["train", "--train.lrr", "1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["eval", "--checkpoint"], "srft: error: --checkpoint: expected a directory or a model's name"),
        (["report"], "srft: error: srft report takes one run directory, found none"),
        (["report", "no/such"], "srft: error: no/such: there is no such run directory"),
    ],
)
def test_wrong_inputs(arguments, expected, capsys):
    assert expected in failure(capsys, *arguments)


def test_debug_shows_the_traceback():
    with pytest.raises(UserError):
        main(["train", "none.toml", "--debug"])


def test_resume_takes_the_newest_checkpoint_and_the_settings_of_the_run(rooms, capsys, tmp_path):
    (tmp_path / "checkpoint-4" / "state").mkdir(parents=True)
    (tmp_path / "config.toml").write_text("[train]\nsteps = 7\n")
    assert main(["train", "--resume", str(tmp_path), "--train.lr", "1e-6"]) == 0
    ((name, config, _, resumed),) = rooms
    assert (name, config.train.steps, config.train.lr) == ("run", 7, 1e-6) and resumed == tmp_path / "checkpoint-4"
    assert "leave one of them out" in failure(capsys, "train", "my.toml", "--resume", str(tmp_path))
    assert "--resume: expected the directory of a run" in failure(capsys, "train", "--resume")
    assert "found no checkpoint-N with a state" in failure(
        capsys, "train", f"--resume={tmp_path / 'checkpoint-4'}/state"
    )


def test_an_interruption_is_told(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(srft.cli, "dispatch", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "srft: interrupted\n"


def test_a_signal_is_told_and_is_the_exit_code(monkeypatch, capsys):
    def terminated(*_):
        raise Interrupted(15)

    monkeypatch.setattr(srft.cli, "dispatch", terminated)
    assert main(["train"]) == 143
    assert capsys.readouterr().err == "srft: interrupted by SIGTERM\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_file_and_what_to_do(monkeypatch, capsys, number):
    def full(*_):
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr(srft.cli, "dispatch", full)
    assert failure(capsys, "train") == (
        f"srft: error: runs/a/metrics.jsonl: {os.strerror(number)}; the disk is full: free some of it, or keep less "
        "with run.keep_checkpoints\n"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_file_without_the_rights_is_a_wrong_input(monkeypatch, capsys, number):
    def denied(*_):
        raise OSError(number, os.strerror(number), "runs/a/report.html")

    monkeypatch.setattr(srft.cli, "dispatch", denied)
    assert failure(capsys, "report", "runs/a").startswith(f"srft: error: runs/a/report.html: {os.strerror(number)}; ")


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr(srft.cli, "dispatch", failing)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "srft: error: unexpected RuntimeError: out of memory; --debug shows where\n"
    with pytest.raises(RuntimeError):
        main(["train", "--debug"])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_data_from_the_real_command(command, tmp_path, tiny_dir):
    """The whole way through the installed command: nothing but the message, and nothing written."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "a", "answer": 1}) + "\n" + '{"question": 1}\n')
    settings = ["--data.train_file", str(data), "--model.path", str(tiny_dir), "--model.device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "srft", command, *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    expected = f"srft: error: {data}:2: question: expected text or a chat, found 1\n"
    assert done.stderr.endswith(expected) and "Traceback" not in done.stderr
    assert {each.name for each in Path(tmp_path).iterdir()} == {"train.jsonl"}


def test_the_model_of_a_run_that_was_stopped(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert "the run has no final model; it was stopped before it saved one" in capsys.readouterr().err
    (tmp_path / "interrupted-3").mkdir()
    (tmp_path / "interrupted-3" / "config.json").write_text("{}")
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert f"it was stopped; evaluate {tmp_path}/interrupted-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.lr=1e-5", "settings begin with two dashes: --train.lr=1e-5"),
        (".", "a model or a run is --checkpoint DIR"),
    ],
)
def test_what_is_no_configuration(argument, expected, capsys):
    assert main(["train", argument]) == 2
    assert expected in capsys.readouterr().err
