"""Names that other packages have for an option: the error says what it is called here."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

import srft_kernels as sk
from srft_kernels import words
from srft_kernels.objectives.objective import ANNOTATIONS

X, W, Y = torch.randn(4, 3), torch.randn(7, 3), torch.arange(4)
OURS = {
    *(name for function in (sk.linear_loss, sk.linear_cross_entropy, sk.linear_distillation, sk.constant_length,
                            sk.hpt_switch)
      for name in inspect.signature(function).parameters),
    *(field.name for cls in (sk.CrossEntropy, sk.SRFT, sk.Correction, sk.Plan, sk.Filter) for field in fields(cls)),
    *ANNOTATIONS,
}  # fmt: skip


def test_every_word_of_ours_exists():
    assert set(words.WORDS) <= OURS
    assert OURS & set(words.ADVICE) == {"mask", "ignore_index"}  # of functions that have them not


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.grpo(beta=0.04), r"PolicyGradient has no option beta: here it is kl_coef"),
        (lambda: sk.grpo(delta=4.0), r"PolicyGradient has no option delta: here it is dual_clip"),
        (lambda: sk.dapo(epsilon_high=0.28), r"no option epsilon_high: here it is clip_high"),
        (lambda: sk.grpo(epsilon=0.2), r"no option epsilon: here it is clip_low and clip_high"),
        (lambda: sk.PolicyGradient(loss_type="dapo"), r"no option loss_type: each has a preset: grpo\(\), dr_grpo"),
        (lambda: sk.srft_paper(entropy_coeff=0.1), r"SRFT has no option entropy_coeff: here it is entropy_coef"),
        (lambda: sk.sft(lse_square_scale=1e-4), r"CrossEntropy has no option lse_square_scale: here it is z_loss"),
        (lambda: sk.Correction(cap=2.0), r"Correction has no option cap: here it is high"),
        (lambda: sk.Plan(chunk_size=64), r"Plan has no option chunk_size: here it is chunk_rows"),
        (lambda: sk.Extras(topk=4), r"Extras has no option topk: did you mean top_k\?"),
        (lambda: sk.constant_length(Y > 0, Y, max_completion_length=3), r"max_completion_length: here it is length"),
        (lambda: sk.sequence_mean(Y > 0, Y, batch_size=3), r"sequence_mean\(\) has no option batch_size: here"),
        (lambda: sk.hpt_switch(Y > 0, Y, Y, Y, gamma=0.5), r"hpt_switch\(\) has no option gamma: here it is threshold"),
        (lambda: sk.Plan.choose(4, 3, 7, chunk_size=3), r"choose\(\) has no option chunk_size"),
        (lambda: sk.linear_loss(hidden_states=X, weight=W, labels=Y, objective=sk.sft()),
         r"linear_loss\(\) has no option hidden_states: here it is input"),
        (lambda: sk.linear_distillation(X, W, X, W, ignore_index=-100), r"pass mask=target != ignore_index"),
        (lambda: sk.SRFTLoss(epsilon=0.1), r"SRFTLoss\(\) has no option epsilon"),
        (lambda: sk.SRFTLoss(bias=None), r"SRFTLoss\(\) has no option bias: here it is linear_bias"),
        (lambda: sk.grpo(nonsense=1), r"PolicyGradient has no option nonsense$"),
        (lambda: sk.linear_cross_entropy(X, W, Y, bias=None), r"linear_cross_entropy\(\) has no option bias: here it"),
        (lambda: sk.linear_cross_entropy(X, W, Y, ce_weight=None), r"no option ce_weight: here it is weight"),
        (lambda: sk.linear_cross_entropy(X, W, Y, shift=True), r"no option shift: pass hidden\[:, :-1\]"),
        (lambda: sk.linear_logprobs(X, W, Y, dist_process_group=None), r"dist_process_group: here it is group"),
        (lambda: sk.linear_logprobs(X, W, Y, logits_scaling=8), r"pass logit_scale=1 / logits_scaling"),
        (lambda: sk.linear_loss(X, W, Y, sk.sft(), bias=W[:, 0]), r"unknown annotation bias: here it is linear_bias"),
        (lambda: sk.linear_loss(X, W, Y, sk.grpo(), beta=0.1, advantages=X[:, 0]),
         r"unknown annotation beta: here it is kl_coef"),
        (lambda: sk.linear_loss(X, W, Y, sk.grpo(), clip_high=0.3, advantages=X[:, 0]),
         r"unknown annotation clip_high: it is an option of the objective, PolicyGradient\(clip_high=...\)"),
        (lambda: sk.linear_loss(X, W, Y, sk.grpo(), attention_mask=Y, advantages=X[:, 0]),
         r"unknown annotation attention_mask: put ignore_index into target"),
        (lambda: sk.linear_loss(X, W, Y, sk.grpo(), old_per_token_logps=X[:, 0], advantages=X[:, 0]),
         r"unknown annotation old_per_token_logps: here it is old_logprobs"),
    ],
)  # fmt: skip
def test_errors_name_our_word(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_other_mistakes_are_pythons_own():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'objective'"):
        sk.linear_loss(X, W, Y, advantages=X[:, 0])
    with pytest.raises(TypeError, match=r"takes from 1 to \d+ positional arguments but 9 were given"):
        sk.Correction(*range(8))
