"""A token weight of 0: no loss and no gradient, whatever the token holds, but what other tokens' losses give it."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk
from srft_kernels.call import Arguments
from srft_kernels.operators import trace

from .cases import problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
SILENT = torch.tensor([False, False, True, True, False, True])


def unclipped(stats, tokens):
    return -tokens.advantages * (stats.logprobs - tokens.old_logprobs).exp() - 0.1 * tokens.rewards * stats.entropy


OBJECTIVES = {
    "grpo": sk.grpo(kl_coef=0.1, correction=sk.Correction()),
    "cispo": sk.cispo(),
    "srft_official": sk.srft_official(kl_coef=0.1),
    "gspo": sk.gspo(clip_low=None, clip_high=None),  # over sequences, of which one is silent and one in part
    "sequence_mis": sk.reinforce(correction=sk.Correction("mask", "sequence", high=20.0)),
    "geometric": sk.reinforce(correction=sk.Correction(level="geometric", high=20.0)),
    "srft_hpt": sk.srft_hpt(ratio_level="sequence", surrogate="ppo"),
    "batch": sk.srft_paper(level="batch", surrogate="ppo"),
    "callable": unclipped,
}
PLANS = [
    {"passes": passes, "compact": compact, "batch_invariant": invariant}
    for passes in (None, 2)
    for compact in (True, False)
    for invariant in (False, True)
]
IN_TRITON = ("srft_official", "gspo", "callable")
CASES = [(name, "torch", plan) for name in OBJECTIVES for plan in PLANS]
CASES += [(name, "triton", plan) for name in IN_TRITON for plan in PLANS if not plan["batch_invariant"]]


def run(objective, columns, plan, call=sk.linear_loss, ignored=False):
    """(loss, dx, dW, db) and the metrics in the order of their names, of silent tokens or `ignored` ones."""
    p = problem("bias", tokens=6, vocab=20, ignored=0)
    x, w, b = p.leaves()
    columns = columns | {"is_demo": torch.arange(6) % 4 == 0, "sequence_ids": torch.arange(6) // 2}
    weight = torch.where(SILENT, 0, torch.linspace(0.5, 1.5, 6))
    target = torch.where(SILENT, -100, p.target) if ignored else p.target
    out = call(x, w, target, objective, linear_bias=b, token_weight=weight, plan=plan, **columns)
    metrics = [out.metrics[name] for name in sorted(out.metrics)]
    return out.loss.detach(), *torch.autograd.grad(out.loss, (x, w, b)), *metrics


def in_operators(x, w, target, objective, linear_bias, token_weight, plan, **annotations):
    """What a compiled graph calls."""
    options = {"linear_bias": linear_bias, "token_weight": token_weight, "plan": plan, **annotations}
    return trace.linear_loss(
        Arguments.of({"input": x, "linear_weight": w, "target": target, "objective": objective, **options})
    )


def annotations(silent: float | None = None) -> dict[str, torch.Tensor]:
    """Every one that is a number; `silent` in the place of those of silent tokens."""
    names = ("advantages", "rewards", "old_logprobs", "ref_logprobs", "sampler_logprobs", "demo_logprobs")
    made = torch.linspace(-3, -0.1, 6 * len(names)).view(len(names), 6)
    if silent is not None:
        made = torch.where(SILENT, silent, made)
    return dict(zip(names, made))


@pytest.mark.parametrize("name, backend, plan", CASES)
def test_whatever_its_annotations_hold(name, backend, plan):
    plan = sk.Plan(backend=backend, chunk_rows=4, block_rows=2, **plan)
    want = run(OBJECTIVES[name], annotations(), plan)
    assert all(value.isfinite().all() for value in want) and all((value != 0).any() for value in want[:4])
    assert all(map(torch.equal, run(OBJECTIVES[name], annotations(torch.nan), plan), want))
    torch.testing.assert_close(run(OBJECTIVES[name], annotations(), plan, ignored=True), want)


@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_a_compiled_graph(name, passes):
    plan = sk.Plan(chunk_rows=4, block_rows=2, passes=passes, compact=False)
    want = run(OBJECTIVES[name], annotations(), plan)
    found = run(OBJECTIVES[name], annotations(torch.nan), plan, in_operators)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("passes", [1, 2])
def test_an_infinite_loss(passes):
    """Here ℓ = −inf, and r = ∞."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.tensor([0.0, 0, 0, 0, -torch.inf])
    weight = torch.tensor([1.0, 1.0, 0.0])
    for objective, old in ((sk.sft(), torch.zeros(3)), (sk.grpo(), torch.tensor([0.0, 0.0, -1e4]))):
        y = torch.tensor([0, 1, 4 if objective == sk.sft() else 2])
        out = sk.linear_loss(
            x, w, y, objective, linear_bias=bias, token_weight=weight, advantages=torch.ones(3), old_logprobs=old,
            plan=sk.Plan(passes=passes),
        )  # fmt: skip
        two = sk.linear_loss(
            x[:2], w, y[:2], objective, linear_bias=bias, token_weight=weight[:2], advantages=torch.ones(2),
            old_logprobs=old[:2],
        )  # fmt: skip
        torch.testing.assert_close(out.loss, two.loss)
        torch.testing.assert_close(torch.autograd.grad(out.loss, (x, w)), torch.autograd.grad(two.loss, (x, w)))


class OfSequences:
    """Each token's loss is the sum of −ℓ over its sequence, with a gradient to all of it."""

    token_local = False

    def __init__(self, scope: str):
        self.scope = lambda given: scope

    def __call__(self, stats, tokens):
        same = tokens.sequence_ids[:, None] == tokens.sequence_ids
        return -(same.to(stats.logprobs.dtype) @ stats.logprobs)


@backends
@pytest.mark.parametrize("scope, passes", [("sequence", None), ("sequence", 1), ("sequence", 2), ("batch", None)])
def test_gradients_through_other_tokens(scope, passes, backend):
    """One token of each sequence has the loss of all of it, the others a weight of 0."""
    p = problem(tokens=6, vocab=20, ignored=0)
    (x, w), ids = p.leaves(), torch.arange(6) // 2
    out = sk.linear_loss(x, w, p.target, OfSequences(scope), token_weight=(torch.arange(6) % 2).float(),
                         sequence_ids=ids, plan=sk.Plan(backend=backend, chunk_rows=4, passes=passes))  # fmt: skip
    loss = -(x @ w.T).log_softmax(-1).gather(1, p.target[:, None]).sum()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (x, w)), torch.autograd.grad(loss, (x, w)))
