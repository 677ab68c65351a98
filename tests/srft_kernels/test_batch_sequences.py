"""Losses that depend on a token's own sequence: one pass where sequences fit a chunk, the same result in two."""

from dataclasses import replace

import pytest
import torch

import srft_kernels as sk
from srft_kernels import engine

from .cases import assert_exact, eager, ours, problem, truth

N = 40
LENGTHS = (7, 3, 9, 1, 12, 8)
OBJECTIVES = {
    "gspo": sk.gspo(clip_low=0.05, clip_high=0.05),
    "srft_hpt": sk.srft_hpt(positive="advantage"),
    "corrected": sk.grpo(correction=sk.Correction("truncate", level="sequence", high=1.5)),
}


def columns() -> dict[str, torch.Tensor]:
    ids = torch.repeat_interleave(torch.tensor([5, 3, 8, 0, 2, 9]), torch.tensor(LENGTHS))
    advantage = torch.tensor([1.0, -0.5, 0.25, 0, 0, 2, 0, 0, -1.0, 0.75])[ids]
    drift = torch.randn(N, generator=torch.Generator().manual_seed(1)) / 20
    return {
        "sequence_ids": ids,
        "advantages": advantage,
        "is_demo": ids % 3 == 0,
        "old_logprobs": -4.9 + drift,
        "sampler_logprobs": -4.9 - drift,
    }


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How often each plan ran."""
    ran = []
    for number, function in ((1, engine.OnePass), (2, engine.Statistics)):
        forward = function.forward
        monkeypatch.setattr(
            function,
            "forward",
            staticmethod(lambda *a, number=number, forward=forward: ran.append(number) or forward(*a)),
        )
    return ran


@pytest.mark.parametrize("chunk_rows", [12, 17, 64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_pass_where_every_sequence_fits(name, chunk_rows, passes):
    p, objective = problem("everything", tokens=N), OBJECTIVES[name]
    plan = sk.Plan(chunk_rows=chunk_rows, block_rows=5)
    given = columns()
    if name != "gspo":
        given.pop("old_logprobs")
    leaves = p.leaves()
    out = sk.linear_loss(*leaves[:2], p.target, objective, linear_bias=leaves[2], plan=plan, **p.head, **given)
    assert passes == [1]
    one = [out.loss, out.logprobs, *torch.autograd.grad(out.loss, leaves)]
    two_pass = replace(plan, passes=2)
    out = sk.linear_loss(*leaves[:2], p.target, objective, linear_bias=leaves[2], plan=two_pass, **p.head, **given)
    assert passes == [1, 2]
    two = [out.loss, out.logprobs, *torch.autograd.grad(out.loss, leaves)]
    torch.testing.assert_close(one, two)
    reference, usual = truth(p, objective, **given), eager(p, objective, **given)
    assert_exact(ours(p, objective, plan, **given), usual, reference)


@pytest.mark.parametrize(
    "why", ["too long", "in two pieces", "host may not look", "invariant", "idle within a sequence"]
)
def test_two_passes_elsewhere(why, passes):
    p, given = problem("random", tokens=N, ignored=0.0), columns()
    plan = sk.Plan(chunk_rows=11 if why == "too long" else 12, block_rows=4)
    plan = replace(plan, compact=False if why == "host may not look" else None, batch_invariant=why == "invariant")
    if why == "in two pieces":
        given["sequence_ids"] = given["sequence_ids"].roll(1)
    if why == "idle within a sequence":
        given["advantages"] = given["advantages"].index_fill(0, torch.tensor([2]), 0)
    x = p.input.requires_grad_()

    def loss(plan: sk.Plan) -> sk.LossOutput:
        return sk.linear_loss(x, p.weight, p.target, OBJECTIVES["gspo"], plan=plan, **given)

    found = loss(plan).loss
    assert passes == [2]
    torch.testing.assert_close(found, loss(sk.Plan(chunk_rows=64, passes=2)).loss)
    with pytest.raises(ValueError, match=r"Plan\(passes=1\), but a token's loss depends on its sequence"):
        loss(replace(plan, passes=1))


def test_it_costs_three_products_not_four(monkeypatch):
    calls = []
    logits = engine.HeadProducts.logits
    monkeypatch.setattr(engine.HeadProducts, "logits", lambda *a: calls.append(len(a[1])) or logits(*a))
    p = problem("random", tokens=N, ignored=0.0)
    given = columns()
    sk.linear_loss(p.input.requires_grad_(), p.weight, p.target, OBJECTIVES["gspo"], **given).loss.backward()
    assert sum(calls) == N
