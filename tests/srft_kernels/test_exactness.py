"""ℓ, H, lse, the loss and every gradient against fp64, no further off than twice eager PyTorch: see cases.py."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import BACKENDS, FP16_KINDS, KINDS, assert_exact, eager, full_statistics, ours, plans, problem, truth

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(1, 1, 1), (1, 4, 2), (2, 3, 1), (3, 5, 2), (7, 3, 127), (13, 16, 257), (5, 40, 1021)]


def everything(stats, tokens):
    """Depends on all three statistics, with other coefficients for each token."""
    return tokens.g * stats.logprobs + tokens.h * stats.entropy + tokens.k * stats.logsumexp


def columns_of(p):
    n = torch.arange(len(p.target))
    return {"g": (n % 5 - 2) / 2, "h": (n % 3 - 1) / 4, "k": (n % 4 - 2) / 8}


def rollout_columns(p):
    n = torch.arange(len(p.target))
    return {"advantages": (n % 5 - 2) / 2, "is_demo": n % 2 == 0, "rewards": (n % 3 - 1) / 1.0}


OBJECTIVES = {
    "everything": (everything, columns_of),
    "cross_entropy": (sk.CrossEntropy(z_loss=1e-3), lambda p: {}),
    "srft_official": (sk.srft_official(entropy_coef=0.1), rollout_columns),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(backend, kind, objective, passes):
    check(problem(kind), objective, plans(backend, passes))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16(backend, kind, passes):
    check(problem(kind, dtype=torch.bfloat16), "everything", plans(backend, passes, chunks=(5,)))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", FP16_KINDS)
def test_fp16(backend, kind, passes):
    check(problem(kind, dtype=torch.float16), "everything", plans(backend, passes, chunks=(5,)))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["random", "peaked", "softcap", "padded", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(backend, shape, kind, passes):
    check(problem(kind, *shape), "everything", plans(backend, passes, chunks=(1, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_score(backend, kind):
    """Without gradients, from the default plan and from any chunking: bit for bit the same."""
    p = problem(kind, tokens=30)
    with torch.no_grad():
        found = [
            sk.linear_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, plan=plan, **p.head)
            for plan in plans(backend)
        ]
        reference = full_statistics(
            p.input.double(), p.weight.double(), None if p.bias is None else p.bias.double(), p, torch.float64
        )
        usual = full_statistics(p.input, p.weight, p.bias, p, torch.float32)
    for name in ("logprobs", "entropy", "logsumexp"):
        values = [getattr(stats, name) for stats in found]
        result = lambda stats, name=name: type("R", (), {"values": {name: getattr(stats, name)}})  # noqa: E731
        live = [sk.TokenStats(*(field[p.live] for field in stats.fields())) for stats in found]
        for stats, value in zip(live, values):
            assert value.dtype == torch.float32 and value.shape == p.target.shape
            assert (value[~p.live] == 0).all()
            assert_exact(result(stats), result(usual), result(reference))


def test_target_of_probability_zero(backend):
    """A banned target has ℓ = −inf and an infinite loss; the other statistics, and every gradient, stay finite."""
    p = problem("banned")
    p.bias[p.target[0]] = -torch.inf
    for passes in (1, 2):
        (plan,) = plans(backend, passes, chunks=(5,))
        x, w, b = p.leaves()
        out = sk.linear_loss(x, w, p.target, sk.sft(), linear_bias=b, plan=plan)
        out.loss.backward()
        assert out.loss == torch.inf and out.logprobs[0] == -torch.inf and out.entropy.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in (x, w, b))


def test_one_live_entry(backend):
    """All entries but the target banned: ℓ = 0, H = 0, and no gradient."""
    p = problem(ignored=0)
    p.target.fill_(3)
    bias = torch.full((len(p.weight),), -torch.inf)
    bias[3] = 0
    for passes in (1, 2):
        (plan,) = plans(backend, passes, chunks=(5,))
        x, w = p.leaves()
        out = sk.linear_loss(x, w, p.target, everything, linear_bias=bias, plan=plan, g=torch.ones(13),
                             h=torch.ones(13), k=torch.zeros(13))  # fmt: skip
        out.loss.backward()
        assert out.loss == 0 and (out.logprobs == 0).all() and (out.entropy == 0).all()
        assert (x.grad == 0).all() and (w.grad == 0).all()


def test_confident_entropy(backend):
    """H of a row with p_max = 1 − 1e-7 or so is its own size of right, not a rounding error of 0."""
    x, w = torch.tensor([[18.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    with torch.no_grad():
        entropy = sk.linear_logprobs(x, w, torch.tensor([0]), plan=sk.Plan(backend=backend)).entropy
    logp = (x.double() @ w.double().t()).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=0.2, atol=0)
    assert entropy > 0


def check(p, objective, plan_list):
    function, columns = OBJECTIVES[objective]
    columns = columns(p)
    reference = truth(p, function, **columns)
    for plan in plan_list:
        assert_exact(ours(p, function, plan, **columns), eager(p, function, plan, **columns), reference, plan)
