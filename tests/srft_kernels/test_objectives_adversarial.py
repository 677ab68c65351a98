"""Every preset where its formula, taken literally, is 0 · ∞ or ∞ − ∞: overflowing ratios, banned targets."""

import math

import pytest
import torch

import srft_kernels as sk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])

PRESETS = {
    name: getattr(sk, name)() for name in vars(sk.presets) if callable(getattr(sk, name, None)) and name.islower()
}
PRESETS |= {
    "dual_clip": sk.grpo(dual_clip=3.0),
    "unclipped": sk.grpo(clip_low=None, clip_high=None),
    "cispo_two_sided": sk.cispo(clip_low=0.2),
    "chord_phi": sk.chord(token_weighted=True),
    "luffy_root": sk.luffy(demo_shape="p^c", demo_shaping=0.5),
    "luffy_rollouts": sk.luffy(ratio_shaping=0.1, demo_max=0.5),
    "luffy_log": sk.luffy(ratio_shape="c*log p", ratio_shaping=1.0, demo_shape="c*log p", max_probability=0.5),
    "corrected": sk.grpo(kl_coef=0.1, correction=sk.Correction()),
    "corrected_sequences": sk.srft_official(correction=sk.Correction("mask", "sequence")),
}
# Triton's interpreter takes its time, and test_triton_objectives.py has every option with these extremes
EVERYWHERE = [(name, "torch") for name in PRESETS] + [
    (name, "triton") for name in ("sft", "dft", "cispo", "dual_clip", "luffy", "srft_paper", "corrected")
]
VOCAB, BANNED, UNIFORM = 17, 16, -math.log(16)


def run(objective, backend: str, target, columns, dtype=torch.float32):
    """(output, dx) where every live token has ℓ = −log 16, and token BANNED has −inf."""
    x, w = torch.zeros(len(target), 8, dtype=dtype), (torch.arange(VOCAB * 8) % 7 - 3.0).view(VOCAB, 8).to(dtype)
    bias = torch.zeros(VOCAB, dtype=dtype)
    bias[BANNED] = -torch.inf
    x.requires_grad_()
    out = sk.linear_loss(
        x, w, target, objective, linear_bias=bias, plan=sk.Plan(backend=backend),
        token_weight=torch.ones(len(target), dtype=dtype), **columns,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, x)[0]


def tokens(advantages: list[float], **columns) -> dict[str, torch.Tensor]:
    n = len(advantages)
    advantages = torch.tensor(advantages)
    filled = {
        "advantages": advantages,
        "rewards": advantages,
        "is_demo": torch.zeros(n).bool(),
        "sequence_ids": torch.arange(n),
    }
    logprobs = {name: torch.full((n,), UNIFORM) for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")}
    return {**filled, **logprobs, **{name: torch.tensor(column) for name, column in columns.items()}}


@pytest.mark.parametrize("name, backend", EVERYWHERE)
def test_ratios_that_overflow(name, backend):
    """A token that the old policy or the sampler thought impossible: losses and gradients stay numbers."""
    never = [-1e9, -torch.inf, -500.0] * 2
    columns = tokens([1.0, 1.0, 0.0, -1.0, -1.0, 0.0], old_logprobs=never, sampler_logprobs=never[1:] + never[:1])
    out, gradient = run(PRESETS[name], backend, torch.arange(6), columns)
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values()), out.metrics


@backends
@pytest.mark.parametrize("name, loss, slope", [
    ("grpo", 1.2, 0.0), ("dapo", 1.28, 0.0), ("unclipped", math.exp(20), math.exp(20)), ("cispo", -5 * UNIFORM, 5.0),
    ("sapo", 4.0, 0.0), ("gspo", 1 + 4e-4, 0.0),
])  # fmt: skip
def test_a_ratio_that_overflows_is_clipped(name, loss, slope, backend):
    """A = 1 and r = ∞ (e^20 where nothing clips it): the loss of the upper bound, and its gradient."""
    columns = tokens([1.0], old_logprobs=[-1e9])
    out, gradient = run(PRESETS[name], backend, torch.zeros(1).long(), columns)
    assert out.loss.item() == pytest.approx(-loss if name != "cispo" else loss, rel=1e-5)
    _, per_logprob = run(sk.reinforce(), backend, torch.zeros(1).long(), columns)  # −A·ℓ
    torch.testing.assert_close(gradient, slope * per_logprob, rtol=1e-5, atol=1e-6)
    out, _ = run(sk.grpo(dual_clip=3.0), backend, torch.zeros(1).long(), tokens([-1.0], old_logprobs=[-1e9]))
    assert out.loss.item() == pytest.approx(3.0)


@pytest.mark.parametrize("old", [UNIFORM, -torch.inf, None])
@pytest.mark.parametrize("name, backend", EVERYWHERE)
def test_banned_targets_never_give_nan(name, old, backend):
    """ℓ = −inf: a loss may be infinite, as −ℓ is, but never NaN, and its gradient is a number."""
    target = torch.tensor([BANNED, 1, BANNED, 3, BANNED])
    for sign in (1.0, -1.0):  # apart, since their infinite losses have opposite signs
        kinds = {"is_demo": [False, False, False, True, sign > 0], "rewards": [sign] * 5}
        columns = tokens([sign, sign, 0.0, sign, sign], **kinds)
        columns["old_logprobs"] = None if old is None else torch.full((5,), old)
        columns["sampler_logprobs"] = torch.full((5,), UNIFORM if old is None else old)
        out, gradient = run(PRESETS[name], backend, target, columns)
        assert not out.loss.isnan() and gradient.isfinite().all()
        assert not any(value.isnan() for value in out.metrics.values()), out.metrics


@backends
@pytest.mark.parametrize("name, objective", [
    ("dft", sk.dft()), ("cispo", sk.cispo()), ("reinforce", sk.reinforce()), ("grpo", sk.grpo()),
    ("chord_phi", sk.chord(1.0, token_weighted=True)), ("luffy", sk.luffy()),
])  # fmt: skip
def test_a_token_without_weight_has_no_loss_though_it_is_banned(name, objective, backend):
    """sg(p)·ℓ at p = 0, A·ℓ at A = 0: 0, the limit, and not 0 · (−∞)."""
    advantage = 1.0 if name in ("cispo", "luffy") else 0.0
    columns = tokens([advantage], is_demo=[name in ("chord_phi", "luffy")])
    out, gradient = run(objective, backend, torch.tensor([BANNED]), columns)
    assert out.loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.parametrize("name, backend", [case for case in EVERYWHERE if isinstance(PRESETS[case[0]], sk.SRFT)])
def test_one_kind_may_be_missing(name, kind, backend):
    """No demonstrations, or no rollouts: the other kind's loss, and metrics of 0 for what is not there."""
    columns = tokens([1.0, -1.0, 0.0, 0.5], is_demo=[kind] * 4)
    out, gradient = run(PRESETS[name], backend, torch.arange(4), columns)
    assert out.loss.isfinite() and gradient.isfinite().all() and (gradient != 0).any()
    missing = (
        ("rollout_loss", "rollout_entropy", "approx_kl") if kind else ("demo_sft_loss", "demo_rl_loss", "demo_entropy")
    )
    assert all(out.metrics[key] == 0 for key in missing)
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("name", PRESETS)
def test_no_advantage_anywhere(name):
    """Nothing to learn but what demonstrations, KL and entropy say."""
    out, gradient = run(PRESETS[name], "torch", torch.arange(4), tokens([0.0] * 4))
    assert out.loss.isfinite() and gradient.isfinite().all()
    if type(PRESETS[name]) is sk.PolicyGradient and not PRESETS[name].kl_coef:
        assert out.loss == 0 and (gradient == 0).all()
