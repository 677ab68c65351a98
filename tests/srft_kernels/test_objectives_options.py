"""What objectives ask for and refuse, before any work: annotations, options, overrides of presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import srft_kernels as sk

from .formulas import SEQUENCE_MIS, batch, found


@pytest.mark.parametrize(
    "objective, given, missing",
    [
        (sk.grpo(), {}, "advantages"),
        (sk.grpo(kl_coef=0.1), {"advantages"}, "ref_logprobs"),
        (sk.gspo(), {"advantages", "old_logprobs"}, "sequence_ids"),
        (sk.sft(kl_coef=0.1), {}, "ref_logprobs"),
        (sk.sft(correction=sk.Correction()), {}, "sampler_logprobs"),
        (sk.hpt(correction=SEQUENCE_MIS), {"advantages", "is_demo", "sampler_logprobs"}, "sequence_ids"),
        (
            sk.srft_paper(level="batch", correction=SEQUENCE_MIS),
            {"advantages", "is_demo", "rewards", "sampler_logprobs"},
            "sequence_ids",
        ),
        (sk.srft_paper(), {"advantages", "rewards"}, "is_demo"),
        (sk.srft_paper(), {"advantages", "is_demo"}, "rewards"),
        (sk.srft_hpt(), {"advantages", "is_demo", "rewards"}, "sequence_ids"),
        (sk.srft_paper(level="batch"), {"advantages", "is_demo"}, "rewards"),
    ],
)
def test_requirements_are_checked_before_any_work(objective, given, missing):
    p, columns = batch("torch")
    columns = {name: c for name, c in columns.items() if name in given}
    with pytest.raises(ValueError, match=rf"needs the annotation {missing}: pass {missing}=... shaped like target"):
        found(p, columns, objective)


def test_two_missing_annotations_are_both_named():
    p, _ = batch("torch")
    with pytest.raises(
        ValueError, match=r"needs the annotations is_demo, advantages: pass is_demo=, advantages=\.\.\."
    ):
        found(p, {}, sk.SRFT())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sk.PolicyGradient(surrogate="trpo"), r"PolicyGradient\(surrogate='trpo'\): expected one of 'rei"),
        (lambda: sk.PolicyGradient(ratio_level="batch"), r"ratio_level='batch'\): expected one of 'token', 'sequence'"),
        (lambda: sk.sapo(dual_clip=3.0), r"PolicyGradient\(dual_clip=3.0\) bounds surrogate='ppo', found 'sapo'"),
        (lambda: sk.sapo(tau_negative=0), r"PolicyGradient\(tau_negative=0\): expected a positive number"),
        (lambda: sk.sft(kl_estimator="k4"), r"CrossEntropy\(kl_estimator='k4'\): expected one of 'k1', 'k2', 'k3'"),
        (lambda: sk.SRFT(demo_shape="sqrt"), r"SRFT\(demo_shape='sqrt'\): expected one of 'p/\(p\+c\)', 'p\^c'"),
        (lambda: sk.SRFT(demo_shape="p^c"), r"SRFT\(demo_shape='p\^c'\) needs its number c: pass demo_shaping=c > 0"),
        (lambda: sk.PolicyGradient(dual_clip=0.5), "dual_clip must be greater than 1, found 0.5"),
        (lambda: sk.PolicyGradient(clip_low=-0.2), r"PolicyGradient\(clip_low=-0.2\): expected a number in \[0, 1\]"),
        (lambda: sk.grpo(clip_low=1.5), r"PolicyGradient\(clip_low=1.5\): expected a number in \[0, 1\]"),
        (lambda: sk.grpo(clip_high=-0.1), r"PolicyGradient\(clip_high=-0.1\): expected a number ≥ 0$"),
        (lambda: sk.grpo(max_probability=2.0), r"PolicyGradient\(max_probability=2.0\): expected a number in \[0, 1\]"),
        (lambda: sk.sft(kl_coef=-1.0), r"CrossEntropy\(kl_coef=-1.0\): expected a number ≥ 0$"),
        (lambda: sk.sft(kl_coef=torch.inf), r"CrossEntropy\(kl_coef=inf\): expected a finite number$"),
        (lambda: sk.sft(kl_coef=True), r"CrossEntropy\(kl_coef=True\): expected a number$"),
        (lambda: sk.grpo(ratio_shape="c*log p", ratio_shaping=1.0), r"clip_high=0.2\): a clip is about 1, but .* is 0"),
        (lambda: sk.SRFT(clip_high="x"), r"SRFT\(clip_high='x'\): expected a number or None$"),
        (lambda: sk.SRFT(level="word"), r"SRFT\(level='word'\): expected one of 'token', 'sequence', 'batch'"),
        (lambda: sk.SRFT(entropy_sign=0), r"SRFT\(entropy_sign=0\): expected -1"),
        (lambda: sk.SRFT(demo_shaping=0.0), r"SRFT\(demo_shaping=0.0\): expected a positive number$"),
        (lambda: sk.luffy(demo_min=0.5, demo_max=0.1), r"demo_min=0.5, demo_max=0.1\): expected demo_min ≤ demo_max"),
        (lambda: sk.grpo(ratio_shape="p^c"), r"PolicyGradient\(ratio_shape='p\^c'\) needs its number c: pass ratio_sh"),
        (lambda: sk.gspo(ratio_shaping=0.5), r"reshapes the ratio of surrogate='ppo' and .* found .ppo. and .seq"),
        (lambda: sk.sapo(ratio_shaping=0.5), r"reshapes the ratio of surrogate='ppo' and .* found 'sapo' and 'token'"),
        (lambda: sk.grpo(max_probability=0), r"PolicyGradient\(max_probability=0\): expected a positive number$"),
        (lambda: sk.grpo(entropy_coef=torch.ones(())), r"entropy_coef=tensor.*expected a number; of a tensor pass"),
        (lambda: sk.sft(z_loss="1"), r"CrossEntropy\(z_loss='1'\): expected a number$"),
        (lambda: sk.sft(kl_coef=None), r"CrossEntropy\(kl_coef=None\): expected a number$"),
        (lambda: sk.srft_paper(demo_max=torch.nan), r"SRFT\(demo_max=nan\): expected a number or None$"),
        (lambda: sk.Correction(high=torch.ones(())), r"Correction\(high=tensor.*expected a number; of a tensor"),
        (lambda: sk.chord(mu=1.5), r"chord\(mu=1.5\): expected a number in \[0, 1\]"),
        (lambda: sk.CrossEntropy(label_smoothing=-0.1), r"label_smoothing must lie in \[0, 1\], found -0.1"),
    ],
)  # fmt: skip
def test_impossible_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_documentation_has_every_preset():
    table = (Path(sk.__file__).parent.parent / "docs/objectives.md").read_text()
    presets = [name for name in vars(sk.presets) if callable(getattr(sk, name, None)) and name.islower()]
    assert len(presets) > 14 and [name for name in presets if f"`{name}(" not in table] == []


def test_presets_take_overrides_of_any_field():
    assert sk.srft_paper(demo_sft_coef=0.7).demo_sft_coef == 0.7
    assert sk.srft_official(entropy_sign=-1).entropy_sign == -1
    assert sk.dapo(clip_high=0.3).clip_high == 0.3 and sk.dapo().clip_high == 0.28
    with pytest.raises(TypeError, match="nonsense"):
        sk.srft_hpt(nonsense=1)
