"""The whole of `srft train`: what a run writes, and what is left of one that stops."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence

import pytest
import torch

from srft import run as run_module
from srft.checkpoint import newest_model, resumable
from srft.config import Config, DataConfig, ModelConfig
from srft.data import build_prompter, load_examples
from srft.errors import UserError
from srft.evaluate import Unscored
from srft.model import load_model
from srft.run import run
from srft.rundir import read_status
from srft.settings import load, recipes
from srft.signals import Interrupted
from srft.trainer import Trainer
from tests.srft.conftest import byte_tokenizer


def small_run(tiny_dir, directory, *overrides: str, recipes: Sequence[str] = ()) -> Config:
    small = {
        "model.path": tiny_dir,
        "model.device": "cpu",
        "run.dir": directory,
        "train.steps": 2,
        "train.prompts_per_step": 2,
        "rollout.per_prompt": 2,
        "rollout.max_new_tokens": 6,
        "eval.prompts": 3,
        "eval.samples": 2,
    }
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    return load(None, words + list(overrides), recipes)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_everything_and_ends_with_its_result(tiny_dir, tmp_path, capsys):
    directory = tmp_path / "run"
    extra = ["--run.checkpoint_every", "1", "--eval.every", "1", "--run.tensorboard", "true"]
    result = run(small_run(tiny_dir, directory, *extra))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == str(result) and last.startswith("held-out reward 0.000 → ")
    assert "3 prompts × 2 samples, seed 17" in last and last.endswith(str(directory / "report.html"))
    assert [line["step"] for line in lines_of(directory / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines_of(directory / "evaluation.jsonl")] == [0, 1, 2]
    assert {line["step"] for line in lines_of(directory / "samples.jsonl")} == {1, 2}
    for name in ("checkpoint-1", "checkpoint-2", "final"):
        assert (directory / name / "model.safetensors").is_file() and (directory / name / "tokenizer.json").is_file()
    assert list((directory / "tensorboard").iterdir())
    assert load(str(directory / "config.toml"), []) == small_run(tiny_dir, directory, *extra)
    prompts = [[g["prompt"] for g in line["generations"]] for line in lines_of(directory / "evaluation.jsonl")]
    assert prompts[0] == prompts[1] == prompts[2]


def test_the_same_seed_gives_the_same_run(tiny_dir, tmp_path):
    for name in ("a", "b"):
        run(small_run(tiny_dir, tmp_path / name))
    a, b = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    for x, y in zip(a, b):
        assert {k: v for k, v in x.items() if k[:7] not in ("seconds", "tokens_", "peak_me")} == {
            k: v for k, v in y.items() if k[:7] not in ("seconds", "tokens_", "peak_me")
        }


def test_no_steps_only_evaluates(tiny_dir, tmp_path, capsys):
    result = run(small_run(tiny_dir, tmp_path / "run", "--train.steps", "0"))
    assert result.before == result.after and result.report.is_file()
    told = capsys.readouterr()
    assert str(result).startswith("held-out reward 0.000 (3 prompts × 2 samples, seed 17) · ")
    assert "step" not in told.err and "training" not in told.out and "of 0 steps" not in told.out


@pytest.mark.parametrize(
    "error, by", [(RuntimeError("boom"), "by an error: RuntimeError: boom"), (KeyboardInterrupt(), "by Ctrl-C")]
)
def test_what_was_written_survives_an_exception(tiny_dir, tmp_path, monkeypatch, capsys, error, by):
    step = Trainer.step

    def failing(self, number):
        if number == 2:
            raise error
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(type(error)):
        run(small_run(tiny_dir, tmp_path / "run"))
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 1
    assert lines_of(tmp_path / "run" / "samples.jsonl") and lines_of(tmp_path / "run" / "evaluation.jsonl")
    told = capsys.readouterr().err
    assert "after step 1 of 2" in told and str(tmp_path / "run" / "interrupted-1") in told
    assert load_model(ModelConfig(str(tmp_path / "run" / "interrupted-1"), device="cpu"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"stopped after step 1 of 2 {by}" in page and "is in interrupted-1" in page


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_what_resume_needs_and_says_the_command(tiny_dir, tmp_path, monkeypatch, capsys, number):
    def signalled(self, step, whole=Trainer.step):
        if step == 3:
            signal.raise_signal(number)
        return whole(self, step)

    monkeypatch.setattr(Trainer, "step", signalled)
    directory, before = tmp_path / "a run", signal.getsignal(number)
    with pytest.raises(Interrupted) as raised:
        run(small_run(tiny_dir, directory, "--train.steps", "5", "--run.checkpoint_every", "4"))
    assert raised.value.number == number and signal.getsignal(number) is before
    assert resumable(str(directory)) == directory / "checkpoint-2" and not list(directory.glob("interrupted-*"))
    told, command = capsys.readouterr().err, f"srft train --resume '{directory}'"
    assert f"interrupted by {raised.value} after step 2 of 5" in told and command in told
    status = read_status(directory)
    assert (status["state"], status["step"], status["reason"]) == ("interrupted", 2, str(raised.value))
    assert status["resume"] == command and "stopped after step 2 of 5 by" in (directory / "report.html").read_text()


def test_a_signal_in_the_middle_of_an_update_waits_for_the_end_of_the_step(tiny_dir, tmp_path, monkeypatch):
    updates = []

    def signalled(self, *arguments, whole=torch.optim.AdamW.step):
        updates.append(1)
        if len(updates) == 3:  # the first of the second step
            signal.raise_signal(signal.SIGTERM)
        return whole(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    more = ["--train.steps", "5", "--run.checkpoint_every", "9", "--train.updates_per_rollout", "2"]
    with pytest.raises(Interrupted):
        run(small_run(tiny_dir, tmp_path / "run", *more))
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert len(updates) == 4 and resumable(str(tmp_path / "run")).name == "checkpoint-2"


def test_a_run_that_stopped_before_its_first_step_has_a_page_that_says_so(tiny_dir, tmp_path, monkeypatch):
    def signalled(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_module, "evaluate", signalled)
    with pytest.raises(Interrupted):
        run(small_run(tiny_dir, tmp_path / "run", "--run.checkpoint_every", "1"))
    assert "stopped before its first step by SIGTERM" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run").glob("*-[0-9]*")) and read_status(tmp_path / "run")["resume"] == ""


@pytest.mark.slow
def test_sigterm_and_resume_from_the_command_line(tiny_dir, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    settings = {"model.path": tiny_dir, "model.device": "cpu", "run.dir": directory, "train.steps": 60}
    settings |= {"train.prompts_per_step": 1, "rollout.max_new_tokens": 6, "eval.prompts": 2, "eval.samples": 1}
    settings |= {"run.checkpoint_every": 1000, "run.samples_per_step": 0}
    command = [sys.executable, "-m", "srft", "train"]
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and len(lines_of(log)) > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"srft train --resume {directory}" in told and told.endswith("srft: interrupted by SIGTERM\n")
    done = read_status(directory)["step"]
    assert 2 < done < 60 and resumable(str(directory)).name == f"checkpoint-{done}"
    again = subprocess.run([*command, "--resume", str(directory)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on after step {done}" in again.stdout and read_status(directory)["state"] == "finished"
    assert [line["step"] for line in lines_of(log)] == list(range(1, 61))


def test_an_objective_shows_only_what_it_has(tiny_dir, tmp_path, capsys):
    run(small_run(tiny_dir, tmp_path / "run", "--loss.preset", "sft"))
    bar, page = capsys.readouterr().err, (tmp_path / "run" / "report.html").read_text()
    assert "loss " in bar and "nan" not in bar and "reward " not in bar
    assert ">rollout tokens<" not in page and "<td>rollout_entropy</td>" not in page and "<td>demo_entropy</td>" in page


def test_checkpoints_are_kept_as_asked_for(tiny_dir, tmp_path, monkeypatch):
    rewards = iter([0.0, 0.1, 0.9, 0.2, 0.3, 0.4])
    real = run_module.evaluate

    def rated(*arguments):
        return run_module.dataclasses.replace(real(*arguments), reward=next(rewards))

    monkeypatch.setattr(run_module, "evaluate", rated)
    monkeypatch.setattr(run_module.report, "build", lambda path: path / "report.html")
    more = ["--train.steps", "5", "--run.checkpoint_every", "1", "--eval.every", "1", "--run.keep_checkpoints", "1"]
    run(small_run(tiny_dir, tmp_path / "run", *more))
    assert sorted(each.name for each in (tmp_path / "run").glob("*-*")) == ["checkpoint-2", "checkpoint-5"]
    assert resumable(str(tmp_path / "run")).name == "checkpoint-5" and (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_no_warning_of_a_dependency_is_seen(tiny_dir, tmp_path, kind):
    """None that our calls raise, and no advice to install kernels for a GPU where there is none."""
    path = tiny_dir
    if kind == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        size = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
        path = tmp_path / "mamba"
        MambaForCausalLM(MambaConfig(**size, eos_token_id=0, pad_token_id=0, bos_token_id=0)).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    strict = [word for kind in ("FutureWarning", "DeprecationWarning") for word in ("-W", f"error::{kind}")]
    settings = {"model.path": path, "model.device": "cpu", "run.dir": tmp_path / "run", "train.steps": 1}
    settings |= {"train.prompts_per_step": 2, "rollout.max_new_tokens": 6, "eval.prompts": 2, "eval.samples": 2}
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, *strict, "-m", "srft", "train", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize("done", [0, 1])
def test_an_error_is_not_hidden_by_a_save_that_fails(tiny_dir, tmp_path, monkeypatch, capsys, done):
    def failing(self, number, step=Trainer.step):
        if number > done:
            raise RuntimeError("boom")
        return step(self, number)

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(Trainer, "step", failing)
    monkeypatch.setattr(run_module.checkpoint, "save", full)
    monkeypatch.setattr(run_module.report, "build", full)
    with pytest.raises(RuntimeError, match="boom"):
        run(small_run(tiny_dir, tmp_path / "run"))
    assert ("the model could not be saved: No space left" in capsys.readouterr().err) == bool(done)


def test_a_disk_that_is_full_at_the_end_still_gives_a_report(tiny_dir, tmp_path, monkeypatch):
    def full(self, directory, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match=r"final could not be written: .*No space left.*free some .*keep_checkpoints"):
        run(small_run(tiny_dir, tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("steps, done", [(2, 2), (9, 5)])
def test_a_run_that_can_take_no_update_stops(tiny_dir, tmp_path, monkeypatch, steps, done):
    def skipping(self, number):
        self.adamw.zero_grad()
        return {"grad_norm": math.nan, "learning_rate": 1.0, "skipped_updates": 1.0}

    monkeypatch.setattr("srft.optim.Optimizer.step", skipping)
    with pytest.raises(UserError, match=f"in {done} steps in a row no gradient was finite"):
        run(small_run(tiny_dir, tmp_path / "run", "--train.steps", str(steps)))
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == done


def test_a_file_without_answers_is_refused_before_the_model_is_loaded(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answers": i + 1}) + "\n" for i in range(9)))
    given = ["--data.train_file", str(file), "--reward.name", "exact"]
    for objective in ([], ["--loss.preset", "sft"]):
        found = "learns from demonstrations, and none of" if objective else "did you mean 'answers'"
        with pytest.raises(UserError, match=rf"train\.jsonl: .*{found}"):
            run(small_run(tmp_path / "no model", tmp_path / "run", *given, *objective))


def test_a_wrong_input_leaves_no_run_directory(tiny_dir, tmp_path):
    for wrong in (["--data.max_prompt_tokens", "3"], ["--loss.preset", "nonsense"], ["--reward.name", "nonsense"]):
        with pytest.raises(UserError):
            run(small_run(tiny_dir, tmp_path / "run", *wrong))
        assert not (tmp_path / "run").exists()


def chats(path, count: int = 24):
    turns = [
        [{"role": "user", "content": f"Say {i} twice."}, {"role": "assistant", "content": f"{i} {i}"}]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path


def test_chats_without_answers_are_measured_by_their_loss(tiny_dir, tmp_path, capsys):
    given = ["--data.train_file", str(chats(tmp_path / "chat.jsonl")), "--loss.preset", "sft", "--train.lr", "1e-2"]
    result = run(small_run(tiny_dir, tmp_path / "run", *given))
    told = capsys.readouterr()
    assert result.after.loss < result.before.loss and result.after.samples == 0
    assert f"held-out loss {result.before.loss:.3f} → {result.after.loss:.3f} (perplexity " in told.out
    assert "nan" not in (told.out + told.err).lower() and "reward" not in told.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mean loss of held-out demonstrations" in page and "Held-out loss" in page and "avg@" not in page
    assert f"{result.after.loss:.3f}" in page


def test_the_held_out_loss_is_the_mean_over_the_demonstrations_tokens(tiny_dir, tmp_path):
    given = ["--data.train_file", str(chats(tmp_path / "chat.jsonl")), "--loss.preset", "sft", "--train.steps", "0"]
    result = run(small_run(tiny_dir, tmp_path / "run", *given))
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu"))
    total = count = 0
    for each in load_examples(load(str(tmp_path / "run" / "config.toml"), []).data, "eval", 3):
        problem = build_prompter(loaded.tokenizer, DataConfig(system_prompt="")).problem(each)
        ids = torch.tensor([problem.prompt + problem.demonstration])
        logp = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None])[len(problem.prompt) - 1 :]
        total, count = total - float(picked.sum()), count + len(picked)
    assert result.after.loss == pytest.approx(total / count, rel=1e-5) and result.after.loss_tokens == count


def test_no_evaluation_where_none_is_asked_for(tiny_dir, tmp_path, capsys):
    result = run(small_run(tiny_dir, tmp_path / "run", "--eval.prompts", "0"))
    assert result.before is result.after is None and not (tmp_path / "run" / "evaluation.jsonl").exists()
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("not evaluated · ")


def test_steps_that_have_nothing_to_learn_from_are_told(tiny_dir, tmp_path, capsys):
    given = ["--loss.preset", "grpo", "--loss.mask_truncated", "true", "--rollout.max_new_tokens", "1"]
    run(small_run(tiny_dir, tmp_path / "run", *given))
    assert "warning: in 2 steps in a row there was nothing to learn from" in capsys.readouterr().out


def test_a_tracker_that_does_not_start_is_in_the_status(tiny_dir, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, __spec__=None))
    monkeypatch.setattr(run_module.tracker, "require_packages", lambda config: None)
    with pytest.raises(Exception, match="no network"):
        run(small_run(tiny_dir, tmp_path / "run", "--run.tracker", "wandb"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def failing_evaluations(monkeypatch, *calls: int):
    """Evaluations of these numbers, from 0, give no score."""
    count = iter(range(99))

    def evaluated(*arguments, original=run_module.evaluate):
        if next(count) in calls:
            raise Unscored("the service is down")
        return original(*arguments)

    monkeypatch.setattr(run_module, "evaluate", evaluated)


def test_an_evaluation_without_a_score_costs_no_run_but_for_the_first(tiny_dir, tmp_path, monkeypatch, capsys):
    failing_evaluations(monkeypatch, 1, 2)
    result = run(small_run(tiny_dir, tmp_path / "run", "--eval.every", "1"))
    assert result.after is None and str(result).startswith("not evaluated · ")
    assert "warning: not evaluated after 1 of 2 steps: the service is down" in capsys.readouterr().out
    failing_evaluations(monkeypatch, 0)
    with pytest.raises(UserError, match="the service is down"):
        run(small_run(tiny_dir, tmp_path / "other"))


def test_a_step_whose_log_cannot_be_written_is_done(tiny_dir, tmp_path, monkeypatch):
    def full(self, rows, original=run_module.RunLog.samples):
        if rows and rows[0]["step"] == 2:
            raise OSError(28, "No space left on device")
        original(self, rows)

    monkeypatch.setattr(run_module.RunLog, "samples", full)
    with pytest.raises(OSError, match="No space"):
        run(small_run(tiny_dir, tmp_path / "run", "--run.checkpoint_every", "9"))
    assert read_status(tmp_path / "run")["step"] == 2
    assert resumable(str(tmp_path / "run")).name == "checkpoint-2"


def test_another_way_to_evaluate_is_done_again(tiny_dir, tmp_path):
    run(small_run(tiny_dir, tmp_path / "run", "--run.checkpoint_every", "2"))
    again = load(str(tmp_path / "run" / "config.toml"), ["--eval.samples", "3"])
    result = run(again, resumed=resumable(str(tmp_path / "run")))
    assert result.after.samples == 3 and "→" not in str(result)
    assert [line["samples"] for line in lines_of(tmp_path / "run" / "evaluation.jsonl")] == [2, 2, 3]


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_each_recipe_runs(tiny_dir, tmp_path, recipe):
    rows = [
        {"prompt": f"{a} + {b} = ?", "demonstration": f"#### {a + b}", "answer": str(a + b)}
        for a in range(6)
        for b in range(6)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = {
        "your_data": ["--data.train_file", str(file)],
        "gsm_symbolic": ["--data.overlong", "drop"],
    }
    run(small_run(tiny_dir, tmp_path / "run", "--data.size", "40", *given.get(recipe, []), recipes=[recipe]))
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    learned = [[bool(line["demo_tokens"]), bool(line["rollout_tokens"])] for line in metrics]
    of = {"sft": [True, False], "grpo": [False, True]}
    stages = {"sft_grpo": ["sft", "grpo"], "grpo_sft": ["grpo", "sft"]}.get(recipe, [recipe] * 2)
    assert all(line == of[stage] for line, stage in zip(learned, stages) if stage in of)
    assert (tmp_path / "run" / "report.html").is_file()


def test_adapters_whose_model_would_be_moved_are_refused(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "run" / "final")
    given = ("--model.lora_rank", "2", "--run.overwrite", "true")
    with pytest.raises(UserError, match=r"^model.path '.*final' lies in run.dir, where run.overwrite moves it"):
        run(small_run(tmp_path / "run" / "final", tmp_path / "run", *given))


def test_the_last_adapters_stay_where_the_merged_model_cannot_be_written(tiny_dir, tmp_path, monkeypatch, capsys):
    def full(loaded, directory, *rest, save=run_module.checkpoint.save):
        if directory.name == "final":
            raise UserError("checkpoint: the disk is full")
        return save(loaded, directory, *rest)

    monkeypatch.setattr(run_module.checkpoint, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        run(small_run(tiny_dir, tmp_path / "run", "--model.lora_rank", "2"))
    assert not list((tmp_path / "run").glob("interrupted-*"))
    assert f"the model in {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().err
    again = load_model(ModelConfig(str(tmp_path / "run" / "adapter"), device="cpu"))
    assert again.adapters and newest_model(tmp_path / "run") == tmp_path / "run" / "adapter"
