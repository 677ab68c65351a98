"""Every preset against the formula of its paper, values and gradients: formulas.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import srft_kernels as sk

from .formulas import (
    FORMULAS,
    GEOMETRIC,
    SEQUENCE_MIS,
    TIS,
    assert_same,
    batch,
    expected,
    found,
    gspo,
    sequence_mean,
    sequence_sum,
    within,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


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
    assert objective.scope(columns) == level and objective.scope((*columns, "weight_entropy")) == "token"
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
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_tokens_that_the_reference_excludes(backend, estimator):
    p, columns = batch(backend)
    columns["ref_logprobs"] = torch.full_like(columns["ref_logprobs"], -torch.inf)
    out, gradients = found(p, columns, sk.grpo(kl_coef=0.1, kl_estimator=estimator), plan=sk.Plan(backend=backend))
    assert all(value.isfinite().all() for value in (out.loss, *gradients, out.metrics["ref_kl"]))
