"""A run that goes on is the run that it was: what may change, and what is refused with both values."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from srft import run as run_module
from srft.checkpoint import resumable
from srft.errors import UserError
from srft.run import run
from srft.settings import load
from srft.trainer import Trainer
from tests.srft.test_run import lines_of, small_run


def rows(path, count: int, first: int = 0):
    lines = [{"prompt": f"{i} + 1 =", "demonstration": f"#### {i + 1}", "answer": i + 1} for i in range(first, count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stopped(tiny_dir, tmp_path):
    """A run of two steps with a checkpoint to go on from, on a file of its own."""
    file = rows(tmp_path / "train.jsonl", 24)
    given = ["--run.checkpoint_every", "1", "--data.train_file", str(file), "--reward.name", "exact"]
    run(small_run(tiny_dir, tmp_path / "run", *given))
    return tmp_path / "run"


def again(directory, *overrides: str):
    checkpoint = resumable(str(directory))
    return run(load(str(directory / "config.toml"), list(overrides)), None, checkpoint)


def prompts_of(directory) -> list[str]:
    return [line["prompt"] for line in lines_of(directory / "samples.jsonl")]


def test_more_steps_draw_the_prompts_of_a_straight_run(stopped, tiny_dir, tmp_path):
    extra = ["--train.steps", "6", "--run.samples_per_step", "2"]
    again(stopped, *extra)
    straight = tmp_path / "straight"
    given = [
        "--run.checkpoint_every",
        "1",
        "--data.train_file",
        str(tmp_path / "train.jsonl"),
        "--reward.name",
        "exact",
    ]
    run(small_run(tiny_dir, straight, *given, *extra))
    assert prompts_of(stopped) == prompts_of(straight)
    assert len(set(prompts_of(stopped))) == 12  # every prompt once before any comes again


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.seed", "5"], r"data.seed was 0, is 5"),
        (["--model.path", "smollm2"], r"model.path was '.*', is 'smollm2'"),
        (["--loss.preset", "grpo"], r"loss.preset was 'srft_paper', is 'grpo'"),
        (["--train.seed", "5"], r"train.seed was 0, is 5"),
        (["--rollout.per_prompt", "3"], r"rollout.per_prompt was 2, is 3"),
        (["--reward.name", "math_verify"], r"reward.name was 'exact', is 'math_verify'"),
        (["--data.size", "9", "--train.prompts_per_step", "3"], r"data.size was 0, is 9; train.prompts_per_step was 2"),
    ],
)
def test_what_would_make_it_another_run_is_refused(stopped, override, message, tmp_path):
    before = (stopped / "config.toml").read_text()
    with pytest.raises(UserError, match=rf"--resume: that would be another run: {message}.*What may change: train.epo"):
        again(stopped, *override)
    assert (stopped / "config.toml").read_text() == before


@pytest.mark.parametrize(
    "count, first, message", [(20, 0, "began with 21 examples.*now there are 18"), (25, 1, "others")]
)
def test_data_that_changed_since_are_refused(stopped, count, first, message):
    rows(stopped.parent / "train.jsonl", count, first)
    with pytest.raises(UserError, match=f"--resume: the training data have changed: .*{message}"):
        again(stopped, "--train.steps", "3")


def test_data_may_lie_elsewhere(stopped, tmp_path):
    (tmp_path / "moved").mkdir()
    there, other = tmp_path / "moved" / "train.jsonl", tmp_path / "other.jsonl"
    (tmp_path / "train.jsonl").rename(there)
    rows(other, 24)
    with pytest.raises(UserError, match=r"have changed: .* 21 examples \(data.train_file '.*train.jsonl'\), .*name"):
        again(stopped, "--train.steps", "3", "--data.train_file", str(other))
    again(stopped, "--train.steps", "3", "--data.train_file", str(there))
    assert load(str(stopped / "config.toml")).data.train_file == str(there)


def test_what_may_change(stopped):
    changed = {"train.lr": "1e-6", "train.steps": "3", "eval.samples": "1", "train.token_budget": "512"}
    result = again(stopped, *[word for key, value in changed.items() for word in (f"--{key}", value)])
    assert [line["step"] for line in lines_of(stopped / "metrics.jsonl")] == [1, 2, 3]
    assert "→" not in str(result)  # the first evaluation had two samples of each prompt


def test_epochs_are_steps(tiny_dir, tmp_path):
    file = rows(tmp_path / "train.jsonl", 24)
    given = [
        "--data.train_file",
        str(file),
        "--reward.name",
        "exact",
        "--train.prompts_per_step",
        "6",
        "--eval.prompts",
        "0",
    ]
    run(small_run(tiny_dir, tmp_path / "run", *given, "--train.epochs", "1.2"))
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]  # 21 prompts, 25.2
    assert "steps = 5 " in (tmp_path / "run" / "config.toml").read_text()


def test_no_evaluation_any_more(stopped):
    assert str(again(stopped, "--train.steps", "3", "--eval.prompts", "0")).startswith("not evaluated")


def test_evaluations_of_other_kinds_are_not_compared(stopped):
    result = again(stopped, "--train.steps", "3", "--eval.temperature", "0")
    assert "→" not in str(result)
    page = (stopped / "report.html").read_text()
    assert "mean held-out reward after 3 steps" in page and "mean held-out reward before and after" not in page


def test_epochs_give_way_to_steps_and_count_what_is_left_of_the_rows(tiny_dir, tmp_path):
    file = rows(tmp_path / "train.jsonl", 24)
    lines = file.read_text().splitlines()
    long = [
        json.dumps({**json.loads(line), "prompt": json.loads(line)["prompt"] + " please" * 30}) for line in lines[::2]
    ]
    file.write_text("\n".join([*long, *lines[1::2]]) + "\n")
    given = [
        "--data.train_file",
        str(file),
        "--reward.name",
        "exact",
        "--eval.prompts",
        "0",
        "--run.checkpoint_every",
        "1",
    ]
    given += ["--data.overlong", "drop", "--data.max_prompt_tokens", "100", "--train.epochs", "1"]
    run(small_run(tiny_dir, tmp_path / "run", *given))
    done = [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert 4 <= len(done) <= 6  # 21 of 24 rows are trained on, a half of which is too long; two prompts a step
    again(tmp_path / "run", "--train.steps", str(len(done) + 1))
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == len(done) + 1
    with pytest.raises(UserError, match=r"train.token_budget was 2048, is 100"):
        again(tmp_path / "run", "--train.steps", "9", "--train.token_budget", "100")


def test_another_directory_is_another_run(stopped):
    with pytest.raises(UserError, match=r"run.dir was '.*run', is 'elsewhere'"):
        again(stopped, "--run.dir", "elsewhere")


@pytest.mark.parametrize(
    "dtype, killed, lora",
    [("float32", True, 0), ("bfloat16", True, 0), ("bfloat16", False, 0), ("bfloat16", True, 4)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tiny_dir, tmp_path, monkeypatch, dtype, killed, lora):
    def failing(self, number, step=Trainer.step):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(run_module.report, "build", lambda path: path / "report.html")  # takes the longest
    timed = ("seconds_rollout", "seconds_train", "tokens_per_second", "peak_memory_mb")
    more = ["--model.dtype", dtype, "--run.checkpoint_every", "2", "--eval.every", "3", "--train.steps", "5"]
    more += ["--train.lr", "1e-3", "--train.updates_per_rollout", "2"]
    more += [
        "--model.lora_rank",
        str(lora),
        "--loss.options.kl_coef",
        "0.1",
    ]  # to the model that the run began with, not to its checkpoint
    run(small_run(tiny_dir, tmp_path / "whole", *more))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", failing)
        if killed:
            patch.setattr(run_module.Run, "saved", lambda _: iter(()))
        run(small_run(tiny_dir, stopped, *more))
    assert resumable(str(stopped)) == stopped / f"checkpoint-{2 if killed else 3}"
    resumed = run(load(str(stopped / "config.toml"), []), resumed=resumable(str(stopped)))
    assert resumed.directory == stopped and resumed.report == stopped / "report.html"
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"):
        expected, found = (lines_of(each / name) for each in (tmp_path / "whole", stopped))
        assert [{k: v for k, v in line.items() if k not in timed} for line in found] == [
            {k: v for k, v in line.items() if k not in timed} for line in expected
        ]
    for name in ["final/model.safetensors", *["adapter/adapter_model.safetensors"] * bool(lora)]:
        weights = [load_file(each / name) for each in (tmp_path / "whole", stopped)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    if killed:  # what came after the checkpoint was done again
        assert [line["step"] for line in lines_of(stopped / "previous-1" / "metrics.jsonl")] == [1, 2, 3]
    # the state of the optimizer is three times the model: only the newest checkpoint has it
    assert [each.name for each in stopped.glob("checkpoint-*") if (each / "state").exists()] == ["checkpoint-4"]


def test_a_run_goes_on_only_where_there_is_something_left_to_do(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.report, "build", lambda path: path / "report.html")
    directory = tmp_path / "run"
    result = run(small_run(tiny_dir, directory, "--run.checkpoint_every", "1"))
    config, last = load(str(directory / "config.toml"), []), resumable(str(directory))
    before = (directory / "metrics.jsonl").read_bytes()
    again = run(config, resumed=last)
    assert (again.before, again.after) == (result.before, result.after)
    assert (directory / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"checkpoint-2: 2 steps are done; train.steps 1 is fewer"):
        run(load(str(directory / "config.toml"), ["--train.steps", "1"]), resumed=last)
    (last / "state" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"state: cannot be loaded: .*; take another checkpoint"):
        run(config, resumed=last)
