"""A setting that means nothing, since another one makes it so, is told when a run begins."""

import pytest

from srft.learn.stages import parts_of
from srft.learn.unused import tell_unused
from srft.settings import load


def tell(*overrides: str) -> None:
    config = load(None, list(overrides))
    tell_unused(config, parts_of(config))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--run.keep_checkpoints", "2"], "run.keep_checkpoints has no effect: without run.checkpoint_every there is"),
        (["--eval.every", "2", "--eval.prompts", "0"], "eval.every has no effect: eval.prompts is 0"),
        (["--rollout.resample", "1", "--loss.preset", "sft"], "rollout.resample has no effect: loss.preset 'sft'"),
        (["--loss.mask_truncated", "true", "--loss.preset", "sft"], "loss.mask_truncated has no effect: loss.preset"),
        (["--train.demo_share", "0.5", "--loss.preset", "grpo"], "train.demo_share has no effect: loss.preset 'grpo'"),
        (["--model.lora_alpha", "8"], "model.lora_alpha has no effect: model.lora_rank is 0"),
        (
            ["--model.reference", "other"],
            "model.reference has no effect: loss.preset 'srft_paper' has no term that keeps",
        ),
        (["--loss.hpt_threshold", "0.5"], "loss.hpt_threshold has no effect: loss.preset 'srft_paper' switches"),
    ],
)
def test_an_option_without_effect_is_told(overrides, told, capsys):
    tell(*overrides)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {told}")


def test_options_with_effect_are_not_told(capsys):
    tell("--run.keep_checkpoints", "2", "--run.checkpoint_every", "2", "--rollout.resample", "1")
    tell("--loss.preset", "hpt", "--loss.hpt_threshold", "0.5")
    tell("--model.lora_rank", "4", "--model.lora_alpha", "8", "--model.reference", "x", "--loss.options.kl_coef", "0.1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--train.epochs", "2", "--train.steps", "5"], "train.steps has no effect: train.epochs 2 says how many"),
        (
            ["--data.train_file", "x", "--data.tasks", "nosuch"],
            "data.tasks has no effect: examples are from data.",
        ),
        (["--data.columns.prompt", "q"], "data.columns has no effect: tasks have none"),
        (["--loss.preset", "sft", "--rollout.per_prompt", "8"], "rollout.per_prompt has no effect: loss.preset 'sft'"),
    ],
)
def test_what_another_option_overrules_is_told(overrides, told, capsys):
    tell(*overrides)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {told}")


COUNTED = "{recipe='sft', train={steps=2}}", "{recipe='grpo', train={epochs=2}}"
LIMITED = "{rollout={max_new_tokens=9}, train={token_budget=99}}"
SFT, GRPO = "{recipe='sft'}", "{recipe='grpo'}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["--train.stages", SFT, SFT, "--rollout.per_prompt", "8"],
            ["rollout.per_prompt has no effect: train.stages learns"],
        ),
        (["--train.stages", SFT, GRPO, "--rollout.per_prompt", "8"], []),
        (
            ["--train.stages", "{recipe='sft', rollout={per_prompt=8, temperature=0.5}}", GRPO],
            [
                "train.stages[1]: rollout.per_prompt has no effect: it learns from no rollouts",
                "train.stages[1]: rollout.temperature has no effect: it learns from no rollouts",
            ],
        ),
        (
            ["--train.stages", SFT, "{recipe='grpo', loss={hpt_threshold=0.4}}"],
            ["train.stages[2]: loss.hpt_threshold has no effect: it switches between no losses"],
        ),
        (
            [
                "--train.stages",
                "{recipe='sft', train={steps=2}}",
                "{recipe='grpo', train={epochs=2}}",
                "--train.epochs",
                "9",
            ],
            ["train.epochs has no effect: each of train.stages has its own"],
        ),
        (
            [
                "--train.stages",
                "{recipe='sft', train={steps=2}}",
                "{recipe='grpo', train={epochs=2}}",
                "--train.steps",
                "9",
            ],
            ["train.steps has no effect: each of train.stages has its own"],
        ),
        (["--train.stage_moments", "kept"], ["train.stage_moments has no effect: there are no train.stages"]),
        (
            ["--train.stages", "{recipe='sft', train={stage_moments='kept'}}", GRPO],
            ["train.stages[1]: train.stage_moments has no effect: no stage is before the first"],
        ),
        (["--train.stages", SFT, GRPO, "--train.stage_moments", "kept"], []),
        (["--eval.sets", "a.jsonl"], ["eval.sets has no effect: a run is measured on its held-out prompts; srft eval"]),
        (
            [
                "--train.stages",
                LIMITED,
                LIMITED,
                "--train.token_budget",
                "80",
            ],
            [],
        ),
    ],
)
def test_of_stages(overrides, told, capsys):
    tell(*overrides)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told) and all(line.startswith(f"warning: {each}") for line, each in zip(lines, told)), (
        lines
    )


def test_a_file_that_every_stage_overrules_is_told_too(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('[loss]\naverage = "sequence"\n[train]\nstages = ["sft", "dapo"]\n')
    config = load(str(tmp_path / "c.toml"))
    tell_unused(config, parts_of(config))
    assert capsys.readouterr().err == "warning: loss.average has no effect: each of train.stages has its own\n"
