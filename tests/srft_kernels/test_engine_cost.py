"""What each plan multiplies: score 2NHV, one pass 6NHV, two passes 8NHV, and nothing for what nobody wants."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import IGNORED
from .counting import Recorder

N, H, V = 32, 16, 200
PRODUCT = 2 * N * H * V


def cost(objective, passes, *, frozen=(), ignored=0, **columns) -> tuple[int, int]:
    """Floating-point operations of matrix products in (forward, backward)."""
    x, w, b = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    for name, tensor in (("x", x), ("w", w), ("b", b)):
        tensor.requires_grad_(name not in frozen)
    y = torch.randint(V, (N,))
    y[torch.randperm(N)[:ignored]] = IGNORED
    plan = sk.Plan(chunk_rows=5, passes=passes)
    with Recorder() as forward:
        loss = sk.linear_loss(x, w, y, objective, linear_bias=b, plan=plan, **columns).loss
    with Recorder() as backward:
        if loss.requires_grad:
            loss.backward()
    for name, tensor in (("x", x), ("w", w), ("b", b)):
        assert (tensor.grad is None) == (name in frozen)
    return forward.flops, backward.flops


def test_cost_of_each_plan():
    """MATH §3: score 2NHV, one pass 6NHV, two pass 8NHV."""
    assert cost(sk.sft(), None, frozen="xwb") == (PRODUCT, 0)
    assert cost(sk.sft(), 1) == (3 * PRODUCT, 0)
    assert cost(sk.sft(), 2) == (PRODUCT, 3 * PRODUCT)


def test_scoring_costs_one_product():
    x, w, y = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(V, (N,))
    with torch.no_grad(), Recorder() as score:
        sk.linear_logprobs(x, w, y)
        sk.linear_loss(x, w, y, sk.sft())
        sk.linear_cross_entropy(x, w, y)
    assert score.flops == 3 * PRODUCT


@pytest.mark.parametrize("frozen, products", [("w", 2), ("x", 2), ("b", 3), ("wb", 2), ("xw", 1)])
def test_frozen_parts_cost_nothing(frozen, products):
    assert cost(sk.sft(), 1, frozen=frozen) == (products * PRODUCT, 0)
    assert cost(sk.sft(), 2, frozen=frozen) == (PRODUCT, (products if frozen != "b" else 3) * PRODUCT)


@pytest.mark.parametrize("passes, products", [(1, (3, 0)), (2, (1, 3))])
def test_ignored_tokens_cost_nothing(passes, products):
    assert cost(sk.sft(), passes, ignored=20) == tuple(k * PRODUCT * 12 // 32 for k in products)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "objective", [sk.reinforce(), sk.grpo(), sk.cispo(), sk.gspo(), sk.srft_official(entropy_coef=0.0)]
)
def test_zero_advantages_cost_the_forward_alone(objective, passes):
    advantages = (torch.arange(N) % 4 == 0).float()  # 8 of 32 count
    columns = {"advantages": advantages, "sequence_ids": torch.arange(N) // 4, "is_demo": torch.zeros(N).bool()}
    if passes == 1 and objective == sk.gspo():
        pytest.skip("two passes by nature")
    forward, backward = cost(objective, passes, **columns)
    if passes == 1:
        assert (forward, backward) == (PRODUCT + 2 * PRODUCT // 4, 0)
    else:
        assert (forward, backward) == (PRODUCT, 3 * PRODUCT // 4)


def test_zero_token_weights_cost_the_forward_alone():
    weight = (torch.arange(N) % 4 == 0).float()
    assert cost(sk.sft(), 1, token_weight=weight) == (PRODUCT + 2 * PRODUCT // 4, 0)
    assert cost(sk.sft(), 2, token_weight=weight) == (PRODUCT, 3 * PRODUCT // 4)


def test_demonstrations_without_an_rl_term_are_idle_only_without_an_sft_term():
    columns = {"advantages": torch.zeros(N), "is_demo": torch.ones(N).bool()}
    assert cost(sk.SRFT(), 1, **columns)[0] == 3 * PRODUCT
    assert cost(sk.luffy(), 1, **columns)[0] == PRODUCT


def test_rollouts_whose_coefficient_is_zero_are_idle():
    columns = {"advantages": torch.ones(N), "is_demo": torch.arange(N) % 4 == 0}
    assert cost(sk.chord(1.0), 1, **columns)[0] == PRODUCT + 2 * PRODUCT // 4
    assert cost(sk.chord(0.5), 1, **columns)[0] == 3 * PRODUCT
