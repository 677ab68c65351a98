"""loss.preset and loss.options: what they become, and one message for each that cannot work."""

from typing import Any

import pytest

import srft_kernels as sk
from srft.config import LossConfig
from srft.errors import UserError
from srft.learn.objective import build_objective, refers
from srft.settings import load
from srft_kernels.objectives import PolicyGradient


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("srft_papr", {}, r"loss\.preset.*found 'srft_papr'; did you mean 'srft_paper'"),
        ("srft_paper", {"entropy_sgn": 1}, r"loss\.options\.entropy_sgn: unknown option; did you mean 'entropy_sign'"),
        ("srft_paper", {"level": "word"}, r"loss\.options.*level"),
        ("srft_paper", {"demo_sft_coef": "abc"}, r"loss\.options\.demo_sft_coef: expected a number, found 'abc'"),
        ("srft_paper", {"demo_sft_coef": True}, "expected a number, found True"),
        ("srft_paper", {"demo_sft_coef": float("nan")}, "expected a number, found nan"),
        ("srft_paper", {"demo_shaping": "x"}, r"demo_shaping: expected a number, found 'x'"),
        ("srft_paper", {"entropy_sign": "minus"}, "entropy_sign: expected a whole number, found 'minus'"),
        ("srft_paper", {"level": 3}, "level: expected text, found 3"),
        ("chord", {"mu": "abc"}, r"loss\.options\.mu: expected a number, found 'abc'"),
        ("chord", {"mu": 2}, r"mu=2"),
        ("chord", {"token_weighted": 1}, "token_weighted: expected true or false, found 1"),
        ("chord", {"options": {}}, r"loss\.options\.options: unknown option"),
        ("hpt", {"switches": True}, "switches: unknown option"),
        ("grpo", {"crosses": True}, "crosses: unknown option"),
        ("sft", {"z_loss": [1]}, r"z_loss: expected a number, found \[1\]"),
    ],
)
def test_what_cannot_work_is_named(preset, options, expected):
    with pytest.raises(UserError, match=expected):
        build_objective(LossConfig(preset, options))


def test_what_the_trainer_does_not_compute_is_named(monkeypatch):
    def grpo(**options: Any) -> PolicyGradient:
        return PolicyGradient(correction=sk.Correction("truncate"), **options)

    monkeypatch.setattr(sk, "grpo", grpo)
    with pytest.raises(UserError, match=r"the objective needs sampler_logprobs, which srft train does not compute"):
        build_objective(LossConfig("grpo"))


@pytest.mark.parametrize("preset", ["srft_paper", "grpo", "chord", "luffy"])
def test_a_reference_is_asked_for_where_the_loss_keeps_near_one(preset):
    assert refers(build_objective(LossConfig(preset, {"kl_coef": 0.1})))
    assert not refers(build_objective(LossConfig(preset)))


def test_options_are_fields_and_arguments_of_the_preset():
    assert build_objective(LossConfig("chord", {"mu": 1, "token_weighted": True})) == sk.chord(1, True)
    assert build_objective(LossConfig("grpo", {"clip_high": None, "dual_clip": 3})).dual_clip == 3
    given = load(None, ["--loss.options.demo_sft_coef", "2", "--loss.options.level", "batch"]).loss
    assert build_objective(given) == sk.srft_paper(demo_sft_coef=2, level="batch")
