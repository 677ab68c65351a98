"""Every preset's formula written out from the papers, of full logits in fp64, beside what the package finds."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

import srft_kernels as sk

from .cases import full_statistics, problem

# Formulas: t has l, H, lse, A, R, o (old), q (reference), s (sampler), d (who wrote the demonstrations), demo, seq of
# each live token.


def sequence_mean(values: Tensor, seq: Tensor) -> Tensor:
    return torch.stack([values[seq == i].mean() for i in seq.tolist()])


def sequence_sum(values: Tensor, seq: Tensor) -> Tensor:
    return torch.stack([values[seq == i].sum() for i in seq.tolist()])


def kind_mean(values: Tensor, demo: Tensor) -> Tensor:
    return torch.stack([values[demo == kind].mean() for kind in demo.tolist()])


def ppo(t, low=0.2, high=0.2):
    r = (t.l - t.o).exp()
    return -torch.minimum(r * t.A, r.clamp(1 - low, 1 + high) * t.A)


def dual_clip(t):
    return torch.where(t.A < 0, torch.minimum(ppo(t), -3 * t.A), ppo(t))


def k3(t):
    return (t.q - t.l).exp() - (t.q - t.l) - 1


def sapo(t, positive=1.0, negative=1.05):
    tau = positive * (t.A > 0) + negative * (t.A <= 0).double()
    return -t.A * torch.sigmoid(tau * ((t.l - t.o).exp() - 1)) * 4 / tau


def gspo(t):
    s = sequence_mean(t.l - t.o, t.seq).exp().detach() * (t.l - t.l.detach()).exp()
    return -torch.minimum(s * t.A, s.clamp(1 - 3e-4, 1 + 4e-4) * t.A)


def srft_paper(t, entropy=None, sign=-1):
    H = (t.H if entropy is None else entropy).detach()
    demo = 0.5 * (sign * H).exp() * -t.l - t.A * t.l.exp()
    return torch.where(t.demo, demo, torch.where(t.R > 0, 0.1 * H.exp() * -t.l, t.l))


def srft_gspo(t):
    """Paper's demonstrations and weights, GSPO's loss with the paper's signs on the rollouts."""
    H, sign = t.H.detach(), torch.where(t.R > 0, 1.0, -1.0)
    s = sequence_mean(t.l - t.o, t.seq).exp().detach() * (t.l - t.l.detach()).exp()
    rollout = torch.where(t.R > 0, 0.1 * H.exp(), 1.0) * -torch.minimum(s * sign, s.clamp(0.8, 1.2) * sign)
    return torch.where(t.demo, srft_paper(t), rollout)


def srft_gspo_sequence_mis(t):
    """Three levels at once: entropies of the batch, ratios of sequences, and their mismatch with the sampler."""
    demo = 0.5 * (-kind_mean(t.H, t.demo)).exp().detach() * -t.l - t.A * t.l.exp()
    rho = sequence_sum(t.o - t.s, t.seq).exp()
    kept = rho * ((rho >= 0.6) & (rho <= 1.5))
    return torch.where(t.demo, demo, kept * srft_gspo(t) / torch.where(t.R > 0, t.H.detach().exp(), 1))


def srft_official(t):
    H, p, r = t.H.detach(), t.l.exp(), (t.l - t.o).exp()
    demo = 0.5 * H.exp() * -t.l - t.A * p / (p + 0.1)
    return torch.where(t.demo, demo, -t.A * r * torch.where(t.A > 0, 0.1 * H.exp(), 1.0)) - 0.001 * t.H


def srft_hpt(t):
    H, p = sequence_mean(t.H, t.seq).detach(), t.l.exp()
    demo = 0.5 * (-H).exp() * -t.l - t.A * p / (p + 0.1)
    return torch.where(t.demo, demo, torch.where(t.R > 0, 0.1 * H.exp() * -t.l, t.l))


def srft_by_advantage(t):
    """Paper's weights, sign of the advantage as the signal (0: silent), PPO's clip as the factor."""
    H, r = t.H.detach(), (t.l - t.o).exp()
    demo = 0.5 * (-H).exp() * -t.l - t.A * t.l.exp()
    clipped = -torch.minimum(r * t.A.sign(), r.clamp(0.9, 1.3) * t.A.sign())
    return torch.where(t.demo, demo, clipped * torch.where(t.A > 0, 0.1 * H.exp(), 1.0))


def luffy(t, shape=lambda p: p / (p + 0.1), ratio=lambda p, old: p / old):
    return torch.where(t.demo, -t.A * shape(t.l.exp()), -t.A * ratio(t.l.exp(), t.o.exp()))


def luffy_clipped(t):
    """on_policy_reshape="p_logp" under PPO's clip and off_policy_min/max_clip, all in one."""
    s = (t.l - t.o).exp() + 0.3 * (t.l - t.o)
    u = t.l.exp().sqrt().clamp(max=0.09).clamp(min=0.05)
    loss = torch.where(t.demo, -t.A * u, torch.maximum(-t.A * s, -t.A * s.clamp(0.8, 1.5)))
    return loss * (t.l.exp() <= 0.02)  # all_max_clip


def chord(t):
    return torch.where(t.demo, 0.3 * -t.l, 0.7 * ppo(t))


def chord_phi(t):
    p = t.l.exp().detach()
    return torch.where(t.demo, 0.5 * p * (1 - p) * -t.l, 0.5 * ppo(t))


def hpt(t):
    return torch.where(t.demo, -t.l, ppo(t))


def within(low, high, inside=lambda rho: rho):
    """ρ, and 0 outside the bounds."""
    return lambda rho: torch.where((rho >= low) & (rho <= high), inside(rho), 0.0)


def corrected(loss, bound, level=None, rho=lambda t: t.o - t.s):
    """The loss times what is kept of ρ = e^{o − s}, of each token or summed over its sequence."""

    def formula(t):
        gap = rho(t).detach()
        gap = gap if level is None else level(gap, t.seq)
        return loss(t) * torch.where(t.demo & torch.tensor(loss in MIXED), 1.0, bound(gap.exp()))

    return formula


MIXED = {srft_paper, srft_official, luffy}
TIS, MIS, REJECT = (
    sk.Correction(high=1.2),
    sk.Correction("mask", low=0.8, high=1.4),
    sk.Correction("reject", "token", 0.8),
)
SEQUENCE_TIS = sk.Correction(level="sequence", low=0.6, high=1.5)
SEQUENCE_MIS = sk.Correction("mask", "sequence", 0.6, 1.5)
GEOMETRIC = sk.Correction("reject", "geometric", 0.9, 1.1)
one = torch.ones_like

FORMULAS = {
    "sft": (sk.sft(), lambda t: -t.l),
    "dft": (sk.dft(), lambda t: -t.l.exp().detach() * t.l),
    "z_loss": (sk.sft(z_loss=0.01), lambda t: -t.l + 0.01 * t.lse**2),
    "sft_entropy": (sk.sft(entropy_coef=0.1), lambda t: -t.l - 0.1 * t.H),
    "dft_entropy": (sk.dft(entropy_coef=0.1), lambda t: -t.l.exp().detach() * t.l - 0.1 * t.H),
    "sft_kl": (sk.sft(kl_coef=0.1, kl_estimator="k2"), lambda t: -t.l + 0.05 * (t.l - t.q) ** 2),
    "reinforce": (sk.reinforce(), lambda t: -t.A * t.l),
    "reinforce_k1": (sk.reinforce(kl_coef=0.04, kl_estimator="k1"), lambda t: -t.A * t.l + 0.04 * (t.l - t.q)),
    "cispo_k2": (sk.cispo(kl_coef=0.04, kl_estimator="k2", clip_high=0.1),
                 lambda t: -(t.l - t.o).exp().clamp(max=1.1).detach() * t.A * t.l + 0.02 * (t.l - t.q) ** 2),
    "grpo": (sk.grpo(), ppo),
    "grpo_kl": (sk.grpo(kl_coef=0.04), lambda t: ppo(t) + 0.04 * k3(t)),
    "grpo_entropy": (sk.grpo(entropy_coef=0.01), lambda t: ppo(t) - 0.01 * t.H),
    "dual_clip": (sk.grpo(dual_clip=3.0), dual_clip),
    "unclipped": (sk.grpo(clip_low=None, clip_high=None), lambda t: -t.A * (t.l - t.o).exp()),
    "clipped_above": (sk.grpo(clip_low=None), lambda t: ppo(t, low=1e9)),
    "dr_grpo": (sk.dr_grpo(), ppo),
    "dapo": (sk.dapo(), lambda t: ppo(t, 0.2, 0.28)),
    "cispo": (sk.cispo(clip_high=0.1), lambda t: -(t.l - t.o).exp().clamp(max=1.1).detach() * t.A * t.l),
    "cispo_two_sided": (sk.cispo(clip_low=0.1, clip_high=0.1),
                        lambda t: -(t.l - t.o).exp().clamp(0.9, 1.1).detach() * t.A * t.l),
    "sapo": (sk.sapo(), sapo),
    "sapo_other_slopes": (sk.sapo(tau_positive=0.5, tau_negative=3.0), lambda t: sapo(t, 0.5, 3.0)),
    "gspo": (sk.gspo(), gspo),
    "gspo_wide": (sk.gspo(clip_low=3e-4, clip_high=4e-4, kl_coef=0.1), lambda t: gspo(t) + 0.1 * k3(t)),
    "srft_paper": (sk.srft_paper(), srft_paper),
    "srft_paper_sequence": (sk.srft_paper(level="sequence"), lambda t: srft_paper(t, sequence_mean(t.H, t.seq))),
    "srft_paper_batch": (sk.srft_paper(level="batch"), lambda t: srft_paper(t, kind_mean(t.H, t.demo))),
    "srft_paper_other_sign": (sk.srft_paper(entropy_sign=1), lambda t: srft_paper(t, sign=1)),
    "srft_official": (sk.srft_official(), srft_official),
    "srft_hpt": (sk.srft_hpt(), srft_hpt),
    "srft_by_advantage": (sk.SRFT(surrogate="ppo", clip_low=0.1, clip_high=0.3), srft_by_advantage),
    "srft_official_kl": (sk.srft_official(kl_coef=0.1),
                         lambda t: srft_official(t) + torch.where(t.demo, 0.0, 0.1 * k3(t))),
    "srft_gspo": (sk.srft_paper(surrogate="ppo", ratio_level="sequence"), srft_gspo),
    "srft_gspo_sequence_mis": (sk.srft_paper(level="batch", surrogate="ppo", ratio_level="sequence",
                                             rollout_weight="constant", correction=SEQUENCE_MIS),
                               srft_gspo_sequence_mis),
    "srft_dft": (sk.luffy(demo_sft_coef=0.3, demo_weight="p", demo_rl_coef=0.0),
                 lambda t: torch.where(t.demo, -0.3 * t.l.exp().detach() * t.l, luffy(t))),
    "luffy": (sk.luffy(), luffy),
    "luffy_p": (sk.luffy(demo_shaping=None), lambda t: luffy(t, lambda p: p)),
    "luffy_wide": (sk.luffy(demo_shaping=0.5), lambda t: luffy(t, lambda p: p / (p + 0.5))),
    "luffy_root": (sk.luffy(demo_shape="p^c", demo_shaping=0.5), lambda t: luffy(t, torch.sqrt)),
    "luffy_log": (sk.luffy(demo_shape="c*log p", demo_shaping=0.3), lambda t: luffy(t, lambda p: 0.3 * p.log())),
    "luffy_p_log": (sk.luffy(demo_shape="p+c*log p", demo_shaping=0.3),
                    lambda t: luffy(t, lambda p: p + 0.3 * p.log())),
    "luffy_rollouts": (sk.luffy(ratio_shaping=0.5),
                       lambda t: luffy(t, ratio=lambda p, old: p / (p + 0.5) / (old / (old + 0.5)))),
    "luffy_rollouts_root": (sk.luffy(ratio_shape="p^c", ratio_shaping=0.5),
                            lambda t: luffy(t, ratio=lambda p, old: torch.sqrt(p / old))),
    "luffy_rollouts_log": (sk.luffy(ratio_shape="c*log p", ratio_shaping=1.0),
                           lambda t: luffy(t, ratio=lambda p, old: p.log() - old.log())),
    "luffy_clipped": (sk.luffy(ratio_shape="p+c*log p", ratio_shaping=0.3, clip_low=0.2, clip_high=0.5,
                               demo_shape="p^c", demo_shaping=0.5, demo_min=0.05, demo_max=0.09, max_probability=0.02),
                      luffy_clipped),
    "luffy_known_writer": (sk.luffy(demo_shaping=None), lambda t: luffy(t, lambda p: p / t.d.exp())),
    "luffy_known_writer_shaped": (sk.luffy(), lambda t: luffy(t, lambda p: p / t.d.exp() / (p / t.d.exp() + 0.1))),
    "hpt": (sk.hpt(), hpt),
    "chord": (sk.chord(mu=0.3), chord),
    "chord_phi": (sk.chord(token_weighted=True), chord_phi),
    "chord_sapo": (sk.chord(mu=0.3, surrogate="sapo"), lambda t: torch.where(t.demo, 0.3 * -t.l, 0.7 * sapo(t))),
    "chord_dual_clip": (sk.chord(mu=0.3, dual_clip=3.0), lambda t: torch.where(t.demo, 0.3 * -t.l, 0.7 * dual_clip(t))),
    "tis": (sk.grpo(correction=TIS), corrected(ppo, lambda rho: rho.clamp(max=1.2))),
    "mis": (sk.grpo(correction=MIS), corrected(ppo, within(0.8, 1.4))),
    "rejection": (sk.sapo(correction=REJECT), corrected(sapo, within(0.8, 2.0, one))),
    "sequence_tis": (sk.reinforce(correction=SEQUENCE_TIS),
                     corrected(lambda t: -t.A * t.l, lambda rho: rho.clamp(0.6, 1.5), sequence_sum)),
    "sequence_mis": (sk.gspo(correction=SEQUENCE_MIS), corrected(gspo, within(0.6, 1.5), sequence_sum)),
    "geometric_rejection": (sk.dapo(correction=GEOMETRIC),
                            corrected(lambda t: ppo(t, 0.2, 0.28), within(0.9, 1.1, one), sequence_mean)),
    "tis_of_the_policy_now": (sk.grpo(correction=sk.Correction(high=1.2, current=True)),
                              corrected(ppo, lambda rho: rho.clamp(max=1.2), rho=lambda t: t.l - t.s)),
    "tis_leaves_kl_and_entropy": (sk.grpo(correction=TIS, kl_coef=0.1, entropy_coef=0.1),
                                  lambda t: FORMULAS["tis"][1](t) + 0.1 * k3(t) - 0.1 * t.H),
    "tis_leaves_demonstrations": (sk.srft_paper(correction=TIS), corrected(srft_paper, lambda rho: rho.clamp(max=1.2))),
    "tis_sft": (sk.sft(correction=TIS), corrected(lambda t: -t.l, lambda rho: rho.clamp(max=1.2))),
}  # fmt: skip


def batch(backend: str):
    """(problem, annotations): four sequences, half of them demonstrations; some advantages 0, ratios on all sides.

    Triton's interpreter takes its time: half the tokens, and no bias, cap or temperature, which other tests try.
    """
    dtype = torch.float64 if backend == "torch" else torch.float32
    tokens = 24 if backend == "torch" else 12
    p = problem("everything" if backend == "torch" else "bias", tokens=tokens, vocab=67, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    stats = full_statistics(p.input.double(), p.weight.double(), p.bias.double(), p)
    logprobs = torch.zeros(tokens, dtype=torch.float64)
    logprobs[p.live] = stats.logprobs
    n = torch.arange(tokens)
    noise = torch.randn(4, tokens, generator=generator, dtype=torch.float64) * 0.4
    return p, {
        "advantages": ((n * 7 % 5) - 2).to(dtype) / 2,
        "rewards": (n // 3 % 2).to(dtype),
        "old_logprobs": (logprobs + noise[0]).to(dtype),
        "ref_logprobs": (logprobs + noise[1]).to(dtype),
        "sampler_logprobs": (logprobs + noise[0] + noise[2]).to(dtype),
        "demo_logprobs": (logprobs + noise[3]).to(dtype),
        "is_demo": n * 4 // tokens % 2 == 0,
        "sequence_ids": n * 4 // tokens * 10 + 3,
    }


def expected(p, columns, formula, weight=None):
    """(loss, dx, dW, db, metrics' ingredients) in fp64 from full logits."""
    leaves = p.leaves(torch.float64)
    stats = full_statistics(*leaves, p)
    rows = {name: c[p.live].double() if c.is_floating_point() else c[p.live] for name, c in columns.items()}
    t = SimpleNamespace(
        l=stats.logprobs, H=stats.entropy, lse=stats.logsumexp, A=rows["advantages"], R=rows["rewards"],
        o=rows["old_logprobs"], q=rows["ref_logprobs"], demo=rows["is_demo"], seq=rows["sequence_ids"],
        s=rows["sampler_logprobs"], d=rows["demo_logprobs"],
    )  # fmt: skip
    per_token = formula(t)
    loss = per_token.mean() if weight is None else (per_token * weight[p.live].double()).sum()
    return loss, torch.autograd.grad(loss, leaves), t


def found(p, columns, objective, writer_known=False, **options):
    """(output, gradients); demo_logprobs, whose presence changes a loss, are passed where `writer_known`."""
    x, w, b = p.leaves()
    columns = {name: c for name, c in columns.items() if name != "demo_logprobs" or writer_known}
    out = sk.linear_loss(x, w, p.target, objective, linear_bias=b, **p.head, **columns, **options)
    return out, torch.autograd.grad(out.loss, (x, w, b))


def assert_same(ours, reference, dtype):
    for value, want in zip(ours, reference):
        allowed = 100 * torch.finfo(dtype).eps * want.abs().amax().clamp(min=1e-3)
        assert (value.double() - want).abs().amax() <= allowed
