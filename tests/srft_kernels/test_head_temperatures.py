"""A temperature of each token, and a scale of the logits: what the specification says, wherever they are asked for."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import IGNORED, bound, error, problem

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
HEADS = {
    "temperatures": {"temperature": True},
    "scale": {"logit_scale": 0.0625},
    "another scale": {"logit_scale": 2.3},
    "scale, temperature, cap": {"logit_scale": 3.0, "temperature": 0.7, "softcap": 4.0},
    "scale, temperatures, cap": {"logit_scale": 0.3, "temperature": True, "softcap": 4.0},
}


def temperatures(p):
    made = torch.rand(len(p.target), generator=torch.Generator().manual_seed(3)) * 2 + 0.25
    return torch.where(p.live, made, torch.nan)  # what an ignored token holds reaches nothing


def everything(stats, tokens):
    return -tokens.advantages * stats.logprobs + 0.3 * stats.entropy + 0.1 * stats.logsumexp


def results(function, p, dtype, objective, head, **options):
    """Loss, ℓ, H and gradients in a type."""
    leaves = p.leaves(dtype)
    bias = leaves[2] if len(leaves) == 3 else None
    advantages = torch.linspace(0.2, 1, len(p.target), dtype=dtype)  # losses that do not cancel
    out = function(*leaves[:2], p.target, objective, linear_bias=bias, advantages=advantages, **head, **options)
    return [out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves)]


@BOTH
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", [everything, sk.reinforce(entropy_coef=0.1)], ids=["callable", "built-in"])
@pytest.mark.parametrize("kind", ["bias", "peaked"])
def test_exact(kind, objective, head, passes, backend):
    """At most twice the error of the specification in fp32, both against it in fp64."""
    p = problem(kind)
    head = {**p.head, **HEADS[head]}
    if head.get("temperature") is True:
        head["temperature"] = temperatures(p)
    plan = sk.Plan(backend=backend, chunk_rows=5, block_rows=3, passes=passes)
    own = results(sk.linear_loss, p, torch.float32, objective, head, plan=plan)
    wide = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in head.items()}
    truth = results(sk.reference.linear_loss, p, torch.float64, objective, wide)
    usual = results(sk.reference.linear_loss, p, torch.float32, objective, head)
    for name, found, right, eager in zip(("loss", "logprobs", "entropy", "dx", "dW", "db"), own, truth, usual):
        assert error(found, right) <= bound(name, eager, right, torch.float32), name


@BOTH
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_a_candidate_that_is_the_target_has_its_log_prob(head, passes, backend):
    """Bit for bit: what is told beside the statistics is rounded as they are."""
    p = problem("bias", ignored=0)
    head = HEADS[head] | ({"temperature": temperatures(p)} if HEADS[head].get("temperature") is True else {})
    plan = sk.Plan(backend=backend, chunk_rows=12, block_rows=3, passes=passes)  # more than a program's 1024 numbers
    candidates = p.target[:, None].expand(-1, 100)
    x, w, bias = p.leaves()
    out = sk.linear_loss(x, w, p.target, sk.sft(), linear_bias=bias, plan=plan, **head,
                         extras=sk.Extras(top_k=3, candidates=candidates))  # fmt: skip
    assert torch.equal(out.extras.candidate_logprobs, out.logprobs[:, None].expand(-1, 100))
    assert (out.extras.top_logprobs[:, 0] >= out.logprobs).all() and (out.extras.top_logprobs <= 0).all()


@BOTH
@pytest.mark.parametrize("s, t", [(2.3, 1.0), (0.3, 0.7), (7.1, True)])
def test_each_step_rounds_as_eager(s, t, backend):
    """One entry's logsumexp is its logit, bit for bit: a scale folded into the temperature would be 0.25 off here."""
    x, w = torch.linspace(-9e4, 9e4, 200)[:, None], torch.ones(1, 1)
    t = torch.linspace(0.3, 2, 200) if t is True else t
    plan, target = sk.Plan(backend=backend, chunk_rows=64), torch.zeros(200, dtype=torch.int64)
    found = sk.linear_logprobs(x, w, target, logit_scale=s, temperature=t, plan=plan).logsumexp
    assert torch.equal(found, x[:, 0] * s / t)


def test_a_large_scale_silences_banned_entries_all_the_same():
    """∂H · log p of an entry that is not there is 0 · ∞, and its factor must not be infinite either."""
    x, w, bias = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True), torch.zeros(9)
    bias[::3] = -torch.inf
    out = sk.linear_loss(x, w, torch.tensor([1, 2, 4]), sk.reinforce(entropy_coef=0.1), linear_bias=bias,
                         advantages=torch.ones(3), logit_scale=1e12)  # fmt: skip
    assert torch.autograd.grad(out.loss, w)[0].isfinite().all()


@BOTH
@pytest.mark.parametrize("plan", [{"compact": False}, {"compact": False, "batch_invariant": True},
                                  {"batch_invariant": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("passes", [1, 2])
def test_dead_rows(passes, plan, backend):
    """Rows that are only there to be skipped, and rows of padding, do not divide by anything."""
    p = problem("everything")
    plan = sk.Plan(backend=backend, chunk_rows=4, block_rows=2, passes=passes, **plan)
    head = {**p.head, "temperature": temperatures(p)}
    own = results(sk.linear_loss, p, torch.float32, everything, head, plan=plan)
    right = results(sk.reference.linear_loss, p, torch.float32, everything, head)
    for found, expected in zip(own, right):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("passes", [1, 2])
def test_one_of_each_is_one_of_all(passes):
    """Equal temperatures are one temperature, bit for bit; so is their gradient, and none flows to them."""
    p, plan = problem("bias"), sk.Plan(chunk_rows=5, passes=passes)
    each = torch.full((len(p.target),), 0.7, requires_grad=True)
    of_each, of_all = (
        results(sk.linear_loss, p, torch.float32, everything, {"temperature": t}, plan=plan) for t in (each, 0.7)
    )
    for one, other in zip(of_each, of_all):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert each.grad is None


@pytest.mark.parametrize("function", [sk.linear_logprobs, sk.linear_cross_entropy])
def test_other_calls_take_them_too(function):
    p = problem("bias", ignored=0)
    head = {"linear_bias": p.bias, "softcap": 3.0, "logit_scale": 0.5, "temperature": temperatures(p)}
    z = sk.reference.logits(p.input, p.weight, **head)
    if function is sk.linear_logprobs:
        own, right = function(p.input, p.weight, p.target, **head).logsumexp, z.logsumexp(-1)
    else:
        own = function(p.input, p.weight, p.target, label_smoothing=0.1, **head)
        right = torch.nn.functional.cross_entropy(z, p.target, label_smoothing=0.1)
    torch.testing.assert_close(own, right)


def test_gradcheck():
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    t, y = torch.rand(5, dtype=torch.float64) + 0.5, torch.arange(5)
    for passes in (1, 2):

        def loss(x, w, passes=passes):
            plan = sk.Plan(chunk_rows=2, passes=passes)
            options = {"temperature": t, "logit_scale": 1.7, "softcap": 2.0, "plan": plan}
            return sk.linear_loss(x, w, y, lambda stats, _: stats.entropy - stats.logprobs, **options).loss

        assert torch.autograd.gradcheck(loss, (x.requires_grad_(), w.requires_grad_()))


def test_on_a_device_nobody_looks(monkeypatch):
    """Where looking would wait, a temperature that is not positive is NaN in its own token's outputs alone."""
    monkeypatch.setattr(sk.checks, "may_look", lambda tensor: False)
    t = torch.tensor([1.0, 0.0, -1.0, torch.nan])
    stats = sk.linear_logprobs(torch.randn(4, 3), torch.randn(9, 3), torch.arange(4), temperature=t)
    assert stats.logprobs.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must be shaped like target \(3,\), found \(2,\)"),
        ({"temperature": torch.ones(3).long()}, TypeError, "temperature must hold floating-point numbers"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, r"temperature\[1\] must be a positive number"),
        ({"temperature": torch.tensor([torch.inf, 1, 1])}, ValueError, r"temperature\[0\] .* found inf"),
        ({"temperature": 0}, ValueError, "temperature must be a positive number, found 0"),
        ({"logit_scale": -1.0}, ValueError, r"logit_scale must be a positive number, found -1\.0"),
        ({"logit_scale": torch.ones(3)}, ValueError, r"must be a positive number of .* pass float\(logit_scale\)"),
        ({"logit_scale": None}, ValueError, "logit_scale must be a positive number, found None"),
        ({"temperature": None}, ValueError, "temperature must be a positive number, found None"),
        ({"softcap": 1e39}, ValueError, r"softcap must lie between 1e-30 and 1e30, found 1e\+39"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an integer or None, found 'a'"),
        ({"temprature": 2.0}, TypeError, "unknown annotation temprature: did you mean temperature?"),
        ({"soft_cap": 2.0}, TypeError, "unknown annotation soft_cap: did you mean softcap?"),
    ],
)
def test_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        sk.linear_loss(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, IGNORED]), sk.sft(), **options)
