"""Jobs that would run and learn nothing are refused before the model is loaded."""

from __future__ import annotations

import pytest

from srft.data import Example
from srft.errors import UserError
from srft.learn import job
from srft.learn.objective import build_objective
from srft.settings import load


def examples(demonstrations: int, count: int = 8, **columns) -> list[Example]:
    turn = [{"role": "user", "content": "?"}]
    return [Example(turn, "#### 1" if i < demonstrations else None, "1", "t", columns) for i in range(count)]


def check(*overrides: str, data: list[Example]) -> None:
    config = load(None, list(overrides))
    job.check(build_objective(config.loss), config, data)


@pytest.mark.parametrize("preset", ["srft_paper", "srft_official", "luffy", "chord", "hpt", "sft", "dft"])
def test_no_demonstration_for_an_objective_that_learns_from_them(preset):
    with pytest.raises(
        UserError, match=rf"loss.preset '{preset}' learns from demonstrations, and none of 8 examples has"
    ):
        check("--loss.preset", preset, data=examples(0, solution="x"))
    with pytest.raises(
        UserError, match=r"other columns: solution\); name the column of the solutions with data.columns"
    ):
        check("--loss.preset", preset, data=examples(0, solution="x"))


def test_some_without_a_demonstration_are_told(capsys):
    check(data=examples(5))
    assert (
        "warning: data.tasks: loss.preset 'srft_paper' learns from demonstrations, and 3 of 8"
        in capsys.readouterr().err
    )
    check(data=examples(8))
    check("--loss.preset", "grpo", data=examples(0))
    check("--loss.options.demo_sft_coef", "0", "--loss.options.demo_rl_coef", "0", data=examples(0))
    assert capsys.readouterr().err == ""


def test_few_demonstrations_are_told_where_steps_go_without_and_a_share_without_effect(capsys):
    check("--train.prompts_per_step", "4", data=examples(1))
    assert "one in 2 steps has a demonstration; train.demo_share gives each" in capsys.readouterr().err
    for overrides in (("--train.prompts_per_step", "8"), ("--train.demo_share", "0.2"), ("--loss.preset", "sft")):
        check("--train.prompts_per_step", "4", *overrides, data=examples(1))
        assert "demo_share" not in capsys.readouterr().err
    check("--train.demo_share", "0.2", data=examples(8))
    assert "train.demo_share has no effect: every example has a demonstration" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["grpo", "dapo", "reinforce", "srft_paper", "luffy"])
def test_a_nucleus_is_not_in_the_losses_log_probs(preset):
    with pytest.raises(
        UserError, match=rf"rollout.top_p 0.9: loss.preset '{preset}' needs the log-probs .*take rollout"
    ):
        check("--loss.preset", preset, "--rollout.top_p", "0.9", data=examples(8))
    check("--loss.preset", "sft", "--rollout.top_p", "0.9", data=examples(8))


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_one_rollout_is_no_group(preset):
    with pytest.raises(UserError, match=r"rollout.per_prompt 1: .* one alone has an advantage of 0.*take 2 at least"):
        check("--loss.preset", preset, "--rollout.per_prompt", "1", data=examples(8))
    check("--loss.preset", "srft_paper", "--rollout.per_prompt", "1", data=examples(8))


def test_nothing_to_train_on_is_nothing_to_check():
    check("--rollout.top_p", "0.5", data=[])


def test_amounts_that_are_hardly_meant(capsys):
    def told(*overrides):
        job.check_amounts(load(None, list(overrides)), 42)
        return capsys.readouterr().err

    assert "there are 5 steps, so that the learning rate never" in told("--train.warmup_steps=50", "--train.steps=5")
    assert "there are 42 prompts, so that each step has some more than once" in told("--train.prompts_per_step=500")
    assert told() == told("--train.steps=1") == told("--train.steps=0", "--train.prompts_per_step=500") == ""
