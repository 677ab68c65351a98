"""What holds for every call: random ones against fp64, and laws that need no reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import srft_kernels as sk
from tests import fuzz

from . import cases

# Poisoned memory (conftest.py) is a fixture of the function, and may well outlive one example.
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
backends = pytest.mark.parametrize("backend", cases.BACKENDS)

kinds = st.sampled_from([kind for kind in cases.KINDS if kind != "gaussian"])  # whose logits are exact in fp32
problems = st.builds(
    cases.problem,
    kinds,
    tokens=st.integers(1, 9),
    hidden=st.integers(1, 8),
    vocab=st.integers(1, 40),
    ignored=st.sampled_from([0, 0.3]),
    seed=st.integers(0, 2**31),
)
plans = st.builds(
    lambda chunk, block, passes: sk.Plan(chunk_rows=chunk, block_rows=min(chunk, block), passes=passes),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
)


@few
@given(st.randoms(use_true_random=False), st.integers(0, 2**31))
def test_random_calls(rng, seed):
    """tests/fuzz.py's cases, with hypothesis to make the choices and to shrink what fails."""
    case = fuzz.draw(seed, rng)
    assert fuzz.failure(case) is None, case


@pytest.mark.parametrize("backend, count", [("torch", 300), ("triton", 60)])
def test_a_slice_of_the_fuzz(backend, count):
    for seed in range(count):
        case = fuzz.draw(seed, backend=backend)
        assert (message := fuzz.failure(case)) is None, f"{message}: {case}"


def test_the_fuzz_notices():
    """One wrong element in a thousandth of its value, or one that was never written."""

    def off(name: str, by: float):
        def run(case):
            values = fuzz.fused(case)
            values[name].view(-1)[0].mul_(1 + by)
            return values

        return run

    case = next(c for c in map(fuzz.draw, range(99)) if c.call == "logprobs" and c.problem.live.all()
                and c.problem.input.dtype == torch.float32 and not c.problem.head)  # fmt: skip
    for name in ("logprobs", "loss", "dW"):
        assert fuzz.failure(case) is None
        assert name in fuzz.failure(case, off(name, 1e-3))
        assert name in fuzz.failure(case, off(name, torch.nan))


def test_the_fuzz_notices_what_else_is_told():
    """An entry or a log-prob that is off by one; a divergence."""

    def off(name: str):
        def run(case):
            values = fuzz.fused(case)
            values[name].view(-1)[0].add_(1)
            return values

        return run

    drawn = [c for c in map(fuzz.draw, range(400)) if c.problem.live.any() and c.problem.input.dtype == torch.float32]
    asked = {
        "rank": lambda extras: extras.rank,
        "argmax": lambda extras: extras.argmax,
        **dict.fromkeys(("top_logits", "top_distinct", "top_logprobs"), lambda extras: extras.top_k),
        "candidate_logprobs": lambda extras: extras.candidates is not None,
    }
    for name, wanted in asked.items():
        case = next(c for c in drawn if c.extras and wanted(c.extras))
        assert fuzz.failure(case) is None and name in fuzz.failure(case, off(name))
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        of_it = (c for c in drawn if c.options.get("divergence") == divergence and c.options["weighted"])
        case = next(c for c in of_it if fuzz.fused(c)["divergence"][0] < 9)  # where 1 is seen
        assert fuzz.failure(case) is None and "divergence" in fuzz.failure(case, off("divergence"))


def test_the_fuzz_draws_every_option():
    drawn = [fuzz.draw(seed) for seed in range(1500)]
    losses = [c for c in drawn if c.call == "loss"]
    assert {c.options["objective"] for c in losses} == set(fuzz.OBJECTIVES)
    for name in ("old_logprobs", "demo_logprobs"):
        assert {name in c.columns for c in losses if "luffy" in c.options["objective"]} == {True, False}
    assert {c.plan.compact for c in drawn if c.plan} == {None, False}
    heads = {(c.call, type(c.problem.head.get("temperature")), "logit_scale" in c.problem.head) for c in drawn}
    kinds = product(("loss", "logprobs", "cross_entropy"), (float, torch.Tensor, type(None)), (False, True))
    assert set(kinds) | {("distillation", type(None), True)} <= heads
    told = {c.options["live_tokens"] is None for c in drawn if c.call != "distillation"}
    assert told == {True, False}
    assert {c.default for c in drawn} == {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    assert {(c.refilled, c.mapped) for c in drawn} == set(product([False, True], repeat=2))
    for name in ("advantages", "token_weight", "is_demo"):
        assert {torch.uint8, torch.int8, torch.int32} < {c.columns[name].dtype for c in losses}
    extras = [c.extras for c in drawn if c.extras]
    assert {(e.rank, e.argmax, e.top_k > 1, e.candidates is None) for e in extras} == set(product(*[[False, True]] * 4))
    apart = [c.options for c in drawn if c.call == "distillation"]
    for told in (lambda o: o["weighted"], lambda o: "vocab_size" in o["teacher"].head):
        found = {(o["divergence"], told(o)) for o in apart}
        assert found == set(product(("forward_kl", "reverse_kl", "jensen_shannon"), (False, True)))


def test_the_fuzz_says_how_to_see_it_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "7", "--cases", "3", "--backend", "torch"])
    monkeypatch.setattr(fuzz, "poison", lambda: None)
    assert fuzz.main() == 0
    monkeypatch.setattr(fuzz, "failure", lambda case: "wrong" if case.seed == 9 else None)
    assert fuzz.main() == 1
    out = capsys.readouterr().out
    assert out.startswith("seed 7\n3 cases passed") and "python -m tests.fuzz --backend torch --seed 9 --cases 1" in out


def gradients(p: cases.Problem, plan: sk.Plan | None = None, coefs=(1.0, 0.5, 0.25), **changes):
    """((ℓ, H, lse), (dx, dW, db)) of Σ g·ℓ + h·H + k·lse in fp64, with a bias always."""
    p = replace(p, bias=torch.zeros(len(p.weight)) if p.bias is None else p.bias)
    leaves = p.leaves(torch.float64)
    head = {**p.head, **changes}
    out = sk.linear_loss(
        *leaves[:2], p.target, lambda s, _: sum(c * field for c, field in zip(coefs, s.fields())),
        linear_bias=leaves[2], token_weight=torch.ones(len(p.target)), plan=plan, **head,
    )  # fmt: skip
    with torch.no_grad():
        stats = sk.linear_logprobs(*leaves[:2], p.target, linear_bias=leaves[2], **head)
    return stats.fields(), torch.autograd.grad(out.loss, leaves)


@few
@given(problems, plans, plans)
def test_results_do_not_depend_on_the_plan(p, plan, other):
    assert_close(gradients(p, plan), gradients(p, other), equal_nan=True)
    with torch.no_grad():
        run = lambda plan: sk.linear_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, plan=plan, **p.head)  # noqa: E731
        for one, two in zip(run(plan).fields(), run(other).fields()):
            assert torch.equal(one, two)


@few
@given(problems, st.randoms(use_true_random=False))
def test_tokens_in_another_order(p, rng):
    order = torch.tensor(rng.sample(range(len(p.target)), len(p.target)))
    stats, (dx, dw, db) = gradients(p)
    moved, (dx2, dw2, db2) = gradients(replace(p, input=p.input[order], target=p.target[order]))
    assert_close(moved, tuple(field[order] for field in stats))
    assert_close((dx2, dw2, db2), (dx[order], dw, db), equal_nan=True)


@few
@given(problems, st.randoms(use_true_random=False))
def test_a_vocabulary_in_another_order(p, rng):
    size = p.head.get("vocab_size", len(p.weight))
    order = torch.tensor(rng.sample(range(size), size))
    target = torch.where(p.live, order.argsort()[p.target.clamp(0)], p.target)
    head = {name: value for name, value in p.head.items() if name != "vocab_size"}
    bias = torch.zeros(size) if p.bias is None else p.bias[order]
    stats, (dx, dw, db) = gradients(p)
    moved, (dx2, dw2, db2) = gradients(replace(p, weight=p.weight[order], bias=bias, target=target, head=head))
    assert_close(moved, stats)
    assert_close((dx2, dw2, db2), (dx, dw[order], db[order]), equal_nan=True)


@few
@given(problems, st.sampled_from([-64.0, 3.0, 1024.0]))
def test_logits_shifted_by_a_constant(p, c):
    """ℓ, H and every gradient stay; lse moves by s c / T; and what moves all logits of a row alike has no gradient."""
    p = replace(p, bias=torch.zeros(len(p.weight)) if p.bias is None else p.bias, head={
        name: value for name, value in p.head.items() if name != "softcap"})  # fmt: skip
    (logprobs, entropy, lse), grads = gradients(p, coefs=(1.0, 0.5, 0.0))
    (logprobs2, entropy2, lse2), grads2 = gradients(replace(p, bias=p.bias + c), coefs=(1.0, 0.5, 0.0))
    assert_close((logprobs2, entropy2), (logprobs, entropy))
    slope = p.head.get("logit_scale", 1.0) / p.head.get("temperature", 1.0)
    assert_close(lse2, lse + c * slope * p.live)
    scale = float(p.input.double().abs().max() + p.weight.double().nan_to_num().abs().max()) + 1
    assert_close(grads2, grads, equal_nan=True, rtol=1e-6, atol=1e-9 * scale)
    assert abs(float(grads[2].sum())) <= 1e-9 * len(p.target) * slope


@few
@given(problems, st.sampled_from([0.25, 0.7, 3.0]))
def test_temperature(p, t):
    """T scales logits: softmax(a / T) is the head's with W / T and b / T, and their gradients are 1 / T of those."""
    p = replace(p, bias=torch.zeros(len(p.weight)) if p.bias is None else p.bias, head={
        name: value for name, value in p.head.items() if name == "vocab_size"})  # fmt: skip
    p = replace(p, input=p.input.double(), weight=p.weight.double(), bias=p.bias.double())
    stats, (dx, dw, db) = gradients(p, temperature=t)
    scaled, (dx2, dw2, db2) = gradients(replace(p, weight=p.weight / t, bias=p.bias / t))
    scale = float(p.input.abs().max() + p.weight.nan_to_num().abs().max()) + 1
    close = {"equal_nan": True, "rtol": 1e-6, "atol": 1e-9 * scale}
    assert_close(stats, scaled, rtol=1e-7, atol=1e-9 * (1 if scale < 1e6 else scale**2))
    assert_close((dx, dw, db), (dx2, dw2 / t, db2 / t), **close)


@few
@given(problems, plans)
def test_bounds(p, plan):
    """ℓ ≤ 0 and 0 ≤ H ≤ log V in fp32, of which a rounding is allowed at log V alone; lse is at least every logit."""
    size = p.head.get("vocab_size", len(p.weight))
    with torch.no_grad():
        stats = sk.linear_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, plan=plan, **p.head)
        leaves = p.leaves()
        highest = fuzz.logits(p, leaves, torch.arange(size), torch.float32).amax(-1)
    logprobs, entropy, lse = (field[p.live] for field in stats.fields())
    assert (logprobs <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= torch.tensor(float(size)).log() * (1 + 4 * torch.finfo(torch.float32).eps)).all()
    assert (lse >= highest[p.live]).all()


@backends
@pytest.mark.parametrize("kind", ["random", "padded", "banned", "everything"])
def test_every_element_is_written(backend, kind):
    """Outputs start out as NaN here (conftest.py): none is left, in any output or gradient, ignored tokens included."""
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    for dtype in (torch.float32, torch.bfloat16):
        p = cases.problem(kind, tokens=5, vocab=35, dtype=dtype)
        for passes in (1, 2):
            plan = sk.Plan(backend=backend, chunk_rows=3, block_rows=2, passes=passes)
            leaves = p.leaves()
            bias = leaves[2] if len(leaves) == 3 else None
            out = sk.linear_loss(
                *leaves[:2], p.target, fuzz.OBJECTIVES["z_loss"], linear_bias=bias, plan=plan, **p.head
            )
            made = (out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves))
            assert all(value.isfinite().all() for value in made)
        stats = sk.linear_logprobs(*leaves[:2], p.target, linear_bias=bias, plan=plan, **p.head)
        made = torch.autograd.grad(stats.entropy.sum() + stats.logsumexp.sum(), leaves)
        assert all(value.isfinite().all() for value in (*stats.fields(), *made))
