"""Every preset against a formula written out here from the papers, values and gradients; and users' own callables."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import srft_kernels as sk

from .cases import IGNORED, full_statistics, problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
passes_of = pytest.mark.parametrize("passes", [None, 2])


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


@pytest.mark.parametrize("backend, passes", [("torch", None), ("torch", 2), ("triton", None)])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(backend, name, passes):
    objective, formula = FORMULAS[name]
    p, columns = batch(backend)
    known = "known_writer" in name
    plan = sk.Plan(backend=backend, chunk_rows=5, block_rows=2, passes=passes)
    weight = None if (backend, passes) == ("torch", None) else torch.rand(len(p.target)).to(p.input.dtype)
    loss, gradients, _ = expected(p, columns, formula, weight)
    out, ours = found(p, columns, objective, known, plan=plan, token_weight=weight)
    assert_same((out.loss, *ours), (loss, *gradients), p.input.dtype)
    # the package's own specification says the same
    x, w, b = p.leaves()
    given = {name: c for name, c in columns.items() if name != "demo_logprobs" or known}
    spec = sk.reference.linear_loss(x, w, p.target, objective, linear_bias=b, token_weight=weight, **p.head, **given)
    assert_same((spec.loss, *torch.autograd.grad(spec.loss, (x, w, b))), (loss, *gradients), p.input.dtype)


@backends
@pytest.mark.parametrize("name", ["grpo", "srft_official", "luffy", "gspo", "sapo", "mis", "sequence_mis"])
def test_fresh_rollouts_need_no_old_logprobs(backend, name):
    """Without them r = 1, and its gradient is that of ℓ."""
    objective, formula = FORMULAS[name]
    p, columns = batch(backend)

    def on_policy(t):
        return formula(SimpleNamespace(**{**vars(t), "o": t.l.detach()}))

    loss, gradients, _ = expected(p, columns, on_policy)
    columns.pop("old_logprobs")
    out, ours = found(p, columns, objective, plan=sk.Plan(backend=backend))
    assert_same((out.loss, *ours), (loss, *gradients), p.input.dtype)


@backends
@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_weight_entropy_makes_one_pass_of_two(backend, level):
    """The trainer's way: a scoring pass gives the mean entropies, then one pass uses them."""
    p, columns = batch(backend)
    objective = sk.srft_paper(level=level)
    assert not objective.token_local(columns) and objective.token_local((*columns, "weight_entropy"))
    two, expected_gradients = found(p, columns, objective, plan=sk.Plan(backend=backend, chunk_rows=5))
    with torch.no_grad():
        entropy = sk.linear_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, **p.head).entropy
    group = columns["sequence_ids"] if level == "sequence" else columns["is_demo"].long()
    mean = torch.zeros_like(entropy)
    for i in group.unique():
        mean[(group == i) & p.live] = entropy[(group == i) & p.live].mean()
    one, gradients = found(
        p, {**columns, "weight_entropy": mean}, objective, plan=sk.Plan(backend=backend, chunk_rows=5, passes=1)
    )
    assert_same((one.loss, *gradients), (two.loss.double(), *(g.double() for g in expected_gradients)), p.input.dtype)


def test_one_pass_is_refused_where_tokens_depend_on_each_other():
    p, columns = batch("torch")
    with pytest.raises(ValueError, match=r"Plan\(passes=1\), but a token's loss depends on other tokens in SRFT"):
        found(p, columns, sk.srft_hpt(level="batch"), plan=sk.Plan(passes=1))


@backends
@passes_of
def test_callable_equals_built_in(backend, passes):
    """A user's function is another way to write what a built-in does, with the same result."""
    p, columns = batch(backend)
    plan = sk.Plan(backend=backend, chunk_rows=7, block_rows=3, passes=passes)
    built_in = sk.srft_official(entropy_coef=0.1)
    a, a_gradients = found(p, columns, built_in, plan=plan)
    b, b_gradients = found(p, columns, lambda stats, tokens: built_in(stats, tokens), plan=plan)
    assert_same((b.loss, *b_gradients), (a.loss.double(), *(g.double() for g in a_gradients)), p.input.dtype)
    assert set(b.metrics) == set() and "clip_fraction" in a.metrics


def test_callable_sees_slices_or_everything():
    p, columns = batch("torch")
    seen = []

    def local(stats, tokens):
        seen.append(len(stats.logprobs))
        return -stats.logprobs * tokens.advantages

    class Centred:
        token_local = False

        def __call__(self, stats, tokens):
            seen.append(len(stats.logprobs))
            return -((stats.logprobs - stats.logprobs.mean()) ** 2)

    plan = sk.Plan(chunk_rows=4, block_rows=2)
    found(p, columns, local, plan=plan)
    assert max(seen) <= 4 and sum(seen) == p.live.sum()
    seen.clear()
    out, gradients = found(p, columns, Centred(), plan=plan)
    assert seen == [p.live.sum()]
    loss, reference, _ = expected(p, columns, lambda t: -((t.l - t.l.mean()) ** 2))
    assert_same((out.loss, *gradients), (loss, *reference), torch.float64)


def test_weight_zero_still_matters_to_other_tokens():
    """token_local=False: a token of weight 0 can carry gradient through the losses of others."""
    p, columns = batch("torch")

    def total(stats, tokens):
        return stats.logprobs.sum().expand(len(stats.logprobs))

    total.token_local = False
    weight = torch.zeros(24, dtype=torch.float64)
    weight[0] = 1
    out, gradients = found(p, columns, total, token_weight=weight)
    loss, reference, _ = expected(p, columns, lambda t: t.l.sum().expand(len(t.l)), weight)
    assert_same((out.loss, *gradients), (loss, *reference), torch.float64)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "returned, found_text",
    [
        (lambda stats: stats.logprobs.sum(), r"shape \(\)"),
        (lambda stats: stats.logprobs[:, None], r"shape \(4, 1\)"),
        (lambda stats: 1.0, "float"),
        (lambda stats: None, "NoneType"),
    ],
)
def test_callable_of_wrong_shape(passes, returned, found_text):
    x, w, y = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.arange(4)
    message = rf"the objective returned {found_text}, expected one loss per token: a tensor of shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        sk.linear_loss(x, w, y, lambda stats, tokens: returned(stats), plan=sk.Plan(passes=passes))


def test_callable_may_return_a_constant():
    """A loss that depends on no statistic has no gradient, and is not an error."""
    for passes in (1, 2):
        p = problem("random")
        x, w = p.leaves()
        out = sk.linear_loss(x, w, p.target, lambda s, t: torch.ones_like(s.logprobs), plan=sk.Plan(passes=passes))
        torch.testing.assert_close(out.loss.detach(), torch.tensor(1.0))
        if out.loss.requires_grad:
            out.loss.backward()
            assert (x.grad == 0).all() and (w.grad == 0).all()


def test_missing_annotation_is_named():
    p, columns = batch("torch")
    message = r"reads the annotation `margin`, which was not given \(given: advantages, .*pass margin="
    with pytest.raises(ValueError, match=message):
        found(p, columns, lambda stats, tokens: stats.logprobs * tokens.margin)
    tokens = sk.Tokens(torch.zeros(2), advantages=None)
    assert tokens.get("advantages") is None and "advantages" not in tokens and "target" in tokens


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


NOWHERE = {  # annotations of one kind alone: whether that is the demonstrations
    "old_logprobs": False,
    "ref_logprobs": False,
    "sampler_logprobs": False,
    "demo_logprobs": True,
    "advantages": False,  # where demonstrations have no RL term
}


@pytest.mark.parametrize("backend, passes", [("torch", 1), ("torch", 2), ("triton", 1)])
@pytest.mark.parametrize("garbage", [torch.nan, -torch.inf])
def test_annotations_of_the_other_kind_are_never_read(garbage, backend, passes):
    """Nobody sampled a demonstration and nobody wrote a rollout, so callers have nothing to put there."""
    p, columns = batch(backend)
    objectives = [sk.chord(kl_coef=0.1, correction=TIS), sk.luffy(ratio_shaping=0.1, kl_coef=0.1, kl_estimator="k2")]
    for objective in objectives if backend == "torch" else objectives[:1]:
        plan = sk.Plan(backend=backend, passes=passes)
        want, gradients = found(p, columns, objective, True, plan=plan)
        demo = columns["is_demo"]
        names = [name for name in NOWHERE if name != "advantages" or not objective.demo_rl_coef]
        bad = {name: torch.where(~demo if NOWHERE[name] else demo, garbage, columns[name]) for name in names}
        out, ours = found(p, {**columns, **bad}, objective, True, plan=plan)
        assert all(map(torch.equal, (out.loss, *ours), (want.loss, *gradients)))
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("correction", [None, SEQUENCE_MIS, GEOMETRIC])
def test_a_sequence_that_begins_as_a_demonstration(correction):
    """Ratios and weights of a sequence are over the tokens that the policy sampled."""
    p, columns = batch("torch")
    columns["sequence_ids"] = columns["sequence_ids"] // 20
    objective = sk.hpt(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, correction=correction)

    def formula(t):
        rollout = gspo(SimpleNamespace(**{**vars(t), "l": t.l[~t.demo], "o": t.o[~t.demo], "A": t.A[~t.demo],
                                          "seq": t.seq[~t.demo]}))  # fmt: skip
        if correction is not None:
            of_sequence, low, high, inside = (
                (sequence_sum, 0.6, 1.5, lambda rho: rho)
                if correction is SEQUENCE_MIS
                else (sequence_mean, 0.9, 1.1, torch.ones_like)
            )
            rollout = rollout * within(low, high, inside)(of_sequence((t.o - t.s)[~t.demo], t.seq[~t.demo]).exp())
        return (-t.l).masked_scatter(~t.demo, rollout)

    loss, gradients, t = expected(p, columns, formula)
    assert any(0 < t.demo[t.seq == i].double().mean() < 1 for i in t.seq)
    out, ours = found(p, columns, objective)
    assert_same((out.loss, *ours), (loss, *gradients), torch.float64)


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
        "ref_kl": k3(t)[roll].mean(),
        "correction_weight": (t.o - t.s).exp().clamp(max=1.2)[roll].mean(),
        "correction_outside": ((t.o - t.s).exp() > 1.2)[roll].double().mean(),
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


def test_small_drifts_do_not_cancel():
    """KL(old ‖ new) ≈ change²/2 of 1e-4, in fp32."""
    logprobs, change = torch.zeros(8), torch.tensor([1e-4, -1e-4] * 4)
    tokens = sk.Tokens(torch.zeros(8, dtype=torch.long), advantages=torch.ones(8), old_logprobs=logprobs)
    found = sk.sapo().metrics(sk.TokenStats(change, logprobs, logprobs), tokens)
    assert set(found) == {"entropy", "approx_kl"}  # SAPO clips nothing
    assert float(found["approx_kl"]) == pytest.approx(5e-9, rel=1e-3)


@backends
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_tokens_that_the_reference_excludes(backend, estimator):
    p, columns = batch(backend)
    columns["ref_logprobs"] = torch.full_like(columns["ref_logprobs"], -torch.inf)
    out, gradients = found(p, columns, sk.grpo(kl_coef=0.1, kl_estimator=estimator), plan=sk.Plan(backend=backend))
    assert all(value.isfinite().all() for value in (out.loss, *gradients, out.metrics["ref_kl"]))


def test_clip_fraction_of_cispo_counts_both_sides():
    """Its clip does not look at the sign of the advantage, PPO's does."""
    x, w, y = torch.zeros(4, 8), torch.zeros(16, 8), torch.arange(4)  # every log-prob is −log 16
    old = -torch.tensor(16.0).log() + torch.tensor([1.0, -1.0, 1.0, 0.0])  # ratios e^−1, e, e^−1, 1
    columns = {"advantages": torch.tensor([1.0, 1.0, -1.0, 1.0]), "old_logprobs": old}
    fractions = [
        sk.linear_loss(x, w, y, objective, **columns).metrics["clip_fraction"].item()
        for objective in (sk.cispo(clip_low=0.2, clip_high=0.2), sk.grpo())
    ]
    assert fractions == [0.75, 0.5]
