"""The loss within autograd: backward twice, factors from above, accumulation, tied weights, autocast, fp16."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import srft_kernels as sk

from .cases import IGNORED, problem
from .test_functional import F64, small


@pytest.mark.parametrize("passes, message", [(1, "the first one retain_graph=True"), (2, "retain_graph=True")])
def test_backward_twice(passes, message):
    """As anywhere in PyTorch: with retain_graph=True as often as one likes, else once, and the error says so."""
    x, w, y, _ = small()
    loss = sk.linear_loss(x, w, y, sk.sft(), plan=sk.Plan(passes=passes)).loss
    (loss * 2).backward(retain_graph=True)
    first = x.grad, w.grad
    x.grad = w.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close((x.grad, w.grad), first)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


@pytest.mark.parametrize("passes", [1, 2])
def test_second_derivatives_are_refused(passes):
    x, w, y, _ = small()
    factor = torch.tensor(2.0, dtype=F64, requires_grad=True)
    loss = sk.linear_loss(x, w, y, sk.sft(), plan=sk.Plan(passes=passes)).loss * factor
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("factor", [0.0, -0.5, 3.0, 65536.0])
def test_upstream_factor(factor, passes):
    x, w, y, _ = small()
    plan = sk.Plan(passes=passes)
    plain = torch.autograd.grad(sk.linear_loss(x, w, y, sk.sft(), plan=plan).loss, (x, w))
    scaled = torch.autograd.grad(sk.linear_loss(x, w, y, sk.sft(), plan=plan).loss * factor, (x, w))
    torch.testing.assert_close(scaled, tuple(g * factor for g in plain))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_reach_what_comes_before(passes):
    """Non-leaf hidden states, and a head that is a function of other parameters."""
    base, scale = torch.randn(5, 4, dtype=F64, requires_grad=True), torch.tensor(1.5, dtype=F64, requires_grad=True)
    w, y = torch.randn(7, 4, dtype=F64, requires_grad=True), torch.randint(7, (5,))
    ours = sk.linear_loss(base.tanh(), w * scale, y, sk.sft(), plan=sk.Plan(passes=passes)).loss
    reference = F.cross_entropy(F.linear(base.tanh(), w * scale), y)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (base, w, scale)), torch.autograd.grad(reference, (base, w, scale))
    )


@pytest.mark.parametrize("passes", [1, 2])
def test_tied_weights(passes):
    """The head is the embedding too: both gradients arrive in one .grad."""
    w = torch.randn(7, 4, dtype=F64, requires_grad=True)
    ids, y = torch.randint(7, (6,)), torch.randint(7, (6,))
    sk.linear_loss(F.embedding(ids, w).tanh(), w, y, sk.sft(), plan=sk.Plan(passes=passes)).loss.backward()
    ours, w.grad = w.grad, None
    F.cross_entropy(F.linear(F.embedding(ids, w).tanh(), w), y).backward()
    torch.testing.assert_close(ours, w.grad)


def test_gradients_accumulate():
    """Two microbatches add to .grad what one batch gives, though .grad may have taken over a gradient's memory."""
    x, w, y, _ = small(shape=(6,))
    weight = sk.token_mean(y != IGNORED)
    sk.linear_loss(x, w, y, sk.sft(), token_weight=weight).loss.backward()
    whole, w.grad, x.grad = (x.grad, w.grad), None, None
    for part in (slice(0, 2), slice(2, 6)):
        sk.linear_loss(x[part], w, y[part], sk.sft(), token_weight=weight[part]).loss.backward()
    torch.testing.assert_close((x.grad, w.grad), whole)


def test_no_grad_and_outputs_are_detached():
    x, w, y, _ = small()
    out = sk.linear_loss(x, w, y, sk.sft())
    assert out.loss.requires_grad
    assert not any(field.requires_grad for field in (out.logprobs, out.entropy, out.logsumexp))
    with torch.no_grad():
        quiet = sk.linear_loss(x, w, y, sk.sft())
    torch.testing.assert_close(quiet.loss, out.loss.detach())
    assert not quiet.loss.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(sk.linear_loss(x, w, y, sk.sft()).loss, out.loss.detach())
    assert not sk.linear_loss(x.detach(), w.detach(), y, sk.sft()).loss.requires_grad
    assert sk.linear_logprobs(x, w, y).entropy.requires_grad


def test_annotations_get_no_gradient():
    x, w, y, _ = small()
    advantages = torch.ones(5, dtype=F64, requires_grad=True)
    sk.linear_loss(x, w, y, sk.reinforce(), advantages=advantages, plan=sk.Plan(passes=2)).loss.backward()
    assert advantages.grad is None


@pytest.mark.parametrize("passes", [1, 2])
def test_hidden_states_are_not_kept_alive(passes):
    """Once backward ran, a loss that is kept for logging holds no activation."""
    import weakref

    x, w, y, _ = small()
    hidden = x.tanh()
    alive = weakref.ref(hidden)
    out = sk.linear_loss(hidden, w, y, sk.sft(), plan=sk.Plan(passes=passes))
    out.loss.backward()
    del hidden
    assert alive() is None


@pytest.mark.parametrize("passes", [1, 2])
def test_autocast(passes):
    """fp32 parameters under bf16 autocast: losses and statistics fp32, gradients in each tensor's own type."""
    p = problem("gaussian", tokens=40)
    x, w = p.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = sk.linear_loss(x, w, p.target, sk.sft(), plan=sk.Plan(passes=passes))
        out.loss.backward()
        mixed = sk.linear_cross_entropy(x.bfloat16(), w, p.target)
    assert out.loss.dtype == out.logprobs.dtype == mixed.dtype == torch.float32
    assert x.grad.dtype == w.grad.dtype == torch.float32
    reference = F.cross_entropy(F.linear(p.input, p.weight), p.target)
    torch.testing.assert_close(out.loss.detach(), reference, rtol=2e-2, atol=0)
    torch.testing.assert_close(mixed.detach(), reference, rtol=2e-2, atol=0)


@pytest.mark.parametrize("passes", [1, 2])
def test_fp16_hidden_states_gradient_does_not_overflow_while_scaled(passes):
    x = torch.ones(8, 1, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[0.0], [8.0]], dtype=torch.float16)
    options = {"temperature": 2.0**-14, "plan": sk.Plan(passes=passes)}
    loss = sk.linear_loss(x, w, torch.zeros(8, dtype=torch.long), sk.sft(), **options).loss
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.dtype == torch.float16 and (dx == 16384).all()


def test_fp16_gradients_neither_vanish_nor_overflow():
    """A mean over 8192 tokens makes gradients of 1e-8 that loss scaling must find, and sums of 1e5 on the way."""
    n, h = 8192, 4
    x, w = torch.full((n, h), 16.0).half().requires_grad_(), (torch.randn(8, h) / 100).half().requires_grad_()
    y = torch.zeros(n, dtype=torch.long)
    sk.linear_cross_entropy(x, w, y).backward()
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    F.cross_entropy(F.linear(*wide), y).backward()
    torch.testing.assert_close(w.grad.double(), wide[1].grad, rtol=2e-3, atol=0)
    x.grad = w.grad = None
    (sk.linear_cross_entropy(x, w, y) * 65536).backward()
    torch.testing.assert_close(x.grad.double(), wide[0].grad * 65536, rtol=4e-3, atol=1e-6)
