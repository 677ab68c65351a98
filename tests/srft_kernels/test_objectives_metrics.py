"""The metrics of the built-in objectives: token means of each part of a loss, over the tokens that have it."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import IGNORED
from .formulas import TIS, batch, expected, found, k3, ppo, srft_official

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@backends
def test_srft_metrics(backend):
    """Token means of each part, over the live tokens of its kind."""
    p, columns = batch(backend)
    objective = sk.srft_official(clip_low=0.2, clip_high=0.2, kl_coef=0.1, correction=TIS)
    out, _ = found(p, columns, objective, plan=sk.Plan(backend=backend))
    _, _, t = expected(p, columns, srft_official)
    H, pr, r, demo, roll = t.H, t.l.exp(), (t.l - t.o).exp(), t.demo, ~t.demo
    weight = torch.where(t.A > 0, 0.1 * H.exp(), 1.0)
    want = {
        "demo_sft_loss": (0.5 * H.exp() * -t.l)[demo].mean(),
        "demo_rl_loss": (-t.A * pr / (pr + 0.1))[demo].mean(),
        "rollout_loss": (ppo(t) * weight)[roll].mean(),
        "demo_entropy": H[demo].mean(),
        "rollout_entropy": H[roll].mean(),
        "demo_weight": (0.5 * H.exp())[demo].mean(),
        "rollout_weight": weight[roll & (t.A > 0)].mean(),
        "clip_fraction": (((r > 1.2) & (t.A > 0)) | ((r < 0.8) & (t.A < 0)))[roll].double().mean(),
        "clip_low_fraction": ((r < 0.8) & (t.A < 0))[roll].double().mean(),
        "clip_high_fraction": ((r > 1.2) & (t.A > 0))[roll].double().mean(),
        "ref_kl": k3(t)[roll].mean(),
        "correction_weight": (t.o - t.s).exp().clamp(max=1.2)[roll].mean(),
        "correction_outside": ((t.o - t.s).exp() > 1.2)[roll].double().mean(),
        "correction_nan": torch.zeros((), dtype=torch.float64),
        "approx_kl": (r - 1 - (t.l - t.o))[roll].mean(),
    }
    assert set(out.metrics) == set(want)
    assert 0 < want["correction_outside"] < 1
    for name, value in want.items():
        assert out.metrics[name].dim() == 0 and not out.metrics[name].requires_grad
        torch.testing.assert_close(out.metrics[name].double(), value.detach(), rtol=1e-4, atol=1e-6, msg=name)
    assert backend == "triton" or 0 < out.metrics["clip_fraction"] < 1


def test_policy_gradient_metrics():
    p, columns = batch("torch")
    out, _ = found(p, columns, sk.grpo(kl_coef=0.1))
    _, _, t = expected(p, columns, ppo)
    r = (t.l - t.o).exp()
    torch.testing.assert_close(out.metrics["entropy"], t.H.mean())
    torch.testing.assert_close(out.metrics["ref_kl"], k3(t).mean())
    torch.testing.assert_close(out.metrics["approx_kl"], (r - 1 - r.log()).mean())
    beyond = ((r > 1.2) & (t.A > 0)) | ((r < 0.8) & (t.A < 0))
    torch.testing.assert_close(out.metrics["clip_fraction"].double(), beyond.double().mean(), atol=1e-6, rtol=1e-6)
    assert set(found(p, columns, sk.reinforce())[0].metrics) == {"entropy"}


def test_no_metrics_of_no_tokens():
    p, columns = batch("torch")
    out = sk.linear_loss(p.input, p.weight, torch.full_like(p.target, IGNORED), sk.srft_paper(), **columns)
    assert out.metrics == {}


def test_small_drifts_do_not_cancel():
    """KL(old ‖ new) ≈ change²/2 of 1e-4, in fp32."""
    logprobs, change = torch.zeros(8), torch.tensor([1e-4, -1e-4] * 4)
    tokens = sk.Tokens(torch.zeros(8, dtype=torch.long), advantages=torch.ones(8), old_logprobs=logprobs)
    found = sk.sapo().metrics(sk.TokenStats(change, logprobs, logprobs), tokens)
    assert set(found) == {"entropy", "approx_kl"}  # SAPO clips nothing
    assert float(found["approx_kl"]) == pytest.approx(5e-9, rel=1e-3)


def test_clip_fractions_are_counted_as_trl_counts_them():
    """Below where A < 0, above where A > 0, CISPO's too, whose clip does not look at the sign of the advantage."""
    x, w, y = torch.zeros(4, 8), torch.zeros(16, 8), torch.arange(4)  # every log-prob is −log 16
    old = -torch.tensor(16.0).log() + torch.tensor([1.0, -1.0, 1.0, 0.0])  # ratios e^−1, e, e^−1, 1
    columns = {"advantages": torch.tensor([1.0, 1.0, -1.0, 1.0]), "old_logprobs": old}
    for objective in (sk.cispo(clip_low=0.2, clip_high=0.2), sk.grpo(dual_clip=3.0)):
        found = sk.linear_loss(x, w, y, objective, **columns).metrics
        fractions = [found[f"clip_{side}fraction"].item() for side in ("", "low_", "high_")]
        assert fractions == [0.5, 0.25, 0.25]
    assert found["dual_clip_fraction"] == 0
    columns = {"advantages": -torch.ones(4), "old_logprobs": old - 1}  # ratios 1, e², 1, e
    found = sk.linear_loss(x, w, y, sk.grpo(dual_clip=3.0), **columns).metrics
    assert found["dual_clip_fraction"] == 0.25 and found["clip_fraction"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_changed_before_metrics_are_read(masked):
    """They are made of them, when first read."""
    x, w, y = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))
    plan = sk.Plan(compact=False)
    ref = -torch.rand(6)
    out = sk.linear_loss(
        x, w, y, sk.sft(kl_coef=0.1), plan=plan, ref_logprobs=ref, ignore_index=-100 if masked else None
    )
    kept = out.logprobs.clone()
    kept.mul_(2)
    assert out.metrics
    out = sk.linear_loss(
        x, w, y, sk.sft(kl_coef=0.1), plan=plan, ref_logprobs=ref, ignore_index=-100 if masked else None
    )
    out.entropy.zero_()
    with pytest.raises(RuntimeError, match="changed in place before they were read"):
        out.metrics  # noqa: B018
