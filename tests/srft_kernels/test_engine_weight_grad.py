"""A caller's own fp32 gradient of the head, added to in place."""

import contextlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import srft_kernels as sk

N, H, V = 20, 8, 50


def tensors(dtype=torch.float32):
    x, w = torch.randn(N, H, dtype=dtype, requires_grad=True), torch.randn(V, H, dtype=dtype, requires_grad=True)
    return x, w, torch.randint(V, (N,))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("filter", [None, sk.Filter(1.0)])
@pytest.mark.parametrize("vocab_size", [None, V - 7])
def test_adds_what_would_have_been_returned(passes, filter, vocab_size):
    x, w, y = tensors()
    y %= V - 7
    plan = sk.Plan(chunk_rows=6, passes=passes, filter=filter)
    dx, dw = torch.autograd.grad(sk.linear_loss(x, w, y, sk.sft(), vocab_size=vocab_size).loss, [x, w])
    total = torch.randn(V, H)
    before = total.clone()
    for _ in range(2):
        x.grad = None
        sk.linear_loss(x, w, y, sk.sft(), vocab_size=vocab_size, weight_grad=total, plan=plan).loss.backward()
    assert w.grad is None
    torch.testing.assert_close(total, before + 2 * dw)
    torch.testing.assert_close(x.grad, dx)


def test_is_not_rounded_to_the_heads_type():
    x, w, y = tensors(torch.bfloat16)
    total = torch.zeros(V, H)
    sk.linear_loss(x, w, y, sk.sft(), weight_grad=total).loss.backward()
    reference = [t.detach().double().requires_grad_() for t in (x, w)]
    sk.reference.linear_loss(*reference, y, sk.sft()).loss.backward()
    found, expected = total.double(), reference[1].grad
    assert (found - expected).norm() < 1e-6 * expected.norm() < (found.bfloat16() - expected).norm()


def test_no_live_token():
    x, w, y = tensors()
    total = torch.ones(V, H)
    sk.linear_loss(x, w, y.fill_(-100), sk.sft(), weight_grad=total).loss.backward()
    assert (total == 1).all()


def test_a_factor_that_comes_too_late_is_refused():
    x, w, y = tensors()
    loss = sk.linear_loss(x, w, y, sk.sft(), weight_grad=torch.zeros(V, H)).loss
    with pytest.raises(RuntimeError, match=r"token_weight \(found a factor of 0\.5\)"):
        (loss / 2).backward()


def test_two_passes_take_any_factor():
    x, w, y = tensors()
    (dw,) = torch.autograd.grad(sk.linear_loss(x, w, y, sk.sft()).loss, [w])
    total = torch.zeros(V, H)
    (sk.linear_loss(x, w, y, sk.sft(), weight_grad=total, plan=sk.Plan(passes=2)).loss / 2).backward()
    torch.testing.assert_close(total, dw / 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, g: (w, g.bfloat16()), ValueError, "weight_grad must be torch.float32, shaped like"),
        (lambda w, g: (w, g[:-1]), ValueError, "found torch.float32, \\(49, 8\\)"),
        (lambda w, g: (w.detach(), g), ValueError, "drop one of the two"),
        (lambda w, g: (w, [g]), TypeError, "weight_grad must be a tensor"),
    ],
)
def test_what_does_not_fit(change, error, message):
    x, w, y = tensors()
    w, grad = change(w, torch.zeros(V, H))
    with pytest.raises(error, match=message):
        sk.linear_loss(x, w, y, sk.sft(), weight_grad=grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("offloaded", [False, True])
def test_is_added_to_once_under_a_checkpoint(reentrant, passes, offloaded):
    """Which runs the forward again; also where hooks of another kind lie between it and the call."""
    x, w, y = torch.randn(40, 16).requires_grad_(), torch.randn(97, 16).requires_grad_(), torch.randint(97, (40,))
    total, plan = torch.zeros(97, 16), None if passes is None else sk.Plan(passes=passes)

    def forward(x):
        hidden = x.tanh()
        with torch.autograd.graph.save_on_cpu() if offloaded else contextlib.nullcontext():
            loss = sk.linear_loss(hidden, w, y, sk.sft(), weight_grad=total, plan=plan).loss
        return loss + 1e-2 * hidden.square().mean()  # for which the forward runs to its end again

    checkpoint(forward, x, use_reentrant=reentrant).backward()
    loss = F.cross_entropy(x.tanh() @ w.T, y) + 1e-2 * x.tanh().square().mean()
    expected = torch.autograd.grad(loss, (w, x))
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(x.grad, expected[1])
    assert w.grad is None


def test_is_added_to_once_under_a_checkpoint_of_somebody_else():
    """DeepSpeed's is made of hooks of its own."""
    x, w, y = tensors()
    total, saved = torch.zeros(V, H), []

    def forward(x):
        hidden = x.tanh()
        return sk.linear_loss(hidden, w, y, sk.sft(), weight_grad=total).loss + 1e-2 * hidden.square().mean()

    def pack(tensor):
        saved.append(None)
        return len(saved) - 1

    def unpack(place):
        if saved[0] is None:
            again = []
            keep = lambda tensor: again.append(tensor.detach()) or tensor.detach()  # noqa: E731
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                forward(x.detach().requires_grad_())
            saved[:] = again
        return saved[place]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward(x)
    loss.backward()
    expected = torch.autograd.grad(F.cross_entropy(x.tanh() @ w.T, y), w)[0]
    torch.testing.assert_close(total, expected)


def test_fp16_is_refused():
    x, w, y = tensors(torch.float16)
    with pytest.raises(TypeError, match="use bf16"):
        sk.linear_loss(x, w, y, sk.sft(), weight_grad=torch.zeros(V, H))
