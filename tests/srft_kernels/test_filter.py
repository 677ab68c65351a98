"""The filtered backward: what it keeps, what it says it dropped, and that its bound is kept."""

from dataclasses import replace

import pytest
import torch

import srft_kernels as sk
from srft_kernels.filter import Filtered

N, H, V = 48, 32, 2000
BITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def peaked(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W, b, y of a model that is fairly sure; the head's rows share a direction, as those of language models do."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(V, H, generator=generator) / H**0.5 + 0.2
    target = torch.randint(60, (N,), generator=generator) * 7
    x = 6 * w[target] + torch.randn(N, H, generator=generator)
    return x.to(dtype), w.to(dtype), torch.zeros(V, dtype=dtype), target


def gradients(plan: sk.Plan | None, objective=None, dtype=torch.float32, **options):
    x, w, b, y = peaked(dtype)
    y[::5] = -100
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    advantages = torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0)
    out = sk.linear_loss(
        *leaves[:2], y, objective or sk.reinforce(), linear_bias=b, plan=plan, advantages=advantages, **options
    )
    out.loss.backward()
    return out, dict(zip(("dx", "dW", "db"), (leaf.grad for leaf in leaves)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


PLAN = sk.Plan(chunk_rows=16, block_rows=4, filter=sk.Filter(1 / 4, 0.2))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", BITS)
def test_with_every_column_it_is_the_dense_backward(dtype, passes):
    plan = replace(PLAN, passes=passes, filter=sk.Filter(1.0))
    (out, found), (_, dense) = gradients(plan, dtype=dtype), gradients(replace(plan, filter=None), dtype=dtype)
    assert out.metrics["filtered_norm"] == 0
    for name in dense:
        assert relative(found[name], dense[name]) < BITS[dtype], name


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", BITS)
def test_a_bound_that_would_be_passed_makes_the_chunk_dense(dtype, passes):
    plan = replace(PLAN, passes=passes, filter=sk.Filter(1 / 100, 1e-9))
    (out, found), (_, dense) = gradients(plan, dtype=dtype), gradients(replace(plan, filter=None), dtype=dtype)
    assert out.metrics["filtered_norm"] == 0
    for name in dense:
        assert relative(found[name], dense[name]) < BITS[dtype], name


@pytest.mark.parametrize("passes", [1, 2])
def test_the_errors_are_what_it_says(passes):
    """Chunks of 16 tokens: dx's error is measured on every one of them."""
    (out, found), (_, dense) = gradients(replace(PLAN, passes=passes)), gradients(None)
    error = {name: relative(found[name], dense[name]) for name in dense}
    assert 0.01 < error["dx"] == pytest.approx(out.metrics["filtered_dx_error"].item(), rel=1e-3)
    assert 0.01 < error["dW"] < 1.2 * out.metrics["filtered_norm"].item() and error["db"] < 1e-5
    assert (found["dW"] == 0).all(1).sum() > V / 5  # columns that no chunk kept


def test_the_dropped_norm_is_the_dropped_norm():
    """Against ∂L/∂a by autograd, chunk by chunk."""
    x, w, _, y = (t.double() for t in peaked())
    y, objective = y.long(), sk.sft()
    a = (x @ w.t()).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(a, y), a)
    dropped = 0.0
    for chunk in PLAN.chunks(N):
        squares = gradient[chunk].square().sum(0)
        dropped += squares.sort().values[: V - round(V / 4)].sum()
    x, w, _, y = peaked()
    out = sk.linear_loss(x.requires_grad_(), w, y, objective, plan=PLAN)
    expected = (dropped / gradient.square().sum()).sqrt()
    torch.testing.assert_close(out.metrics["filtered_norm"].double(), expected, rtol=1e-3, atol=0)


def test_each_chunk_keeps_the_bound():
    """Half of the chunks are flat rows that no few columns stand for: these are done densely, the others are not."""
    x, w, _, y = peaked()
    x[: N // 2] = 0
    plan = replace(PLAN, chunk_rows=N // 4, filter=sk.Filter(1 / 16, 0.3))
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    out = sk.linear_loss(
        inputs[0], w, y, sk.PolicyGradient("reinforce", entropy_coef=1.0), plan=plan, advantages=torch.zeros(N)
    )
    dense = sk.linear_loss(inputs[1], w, y, sk.PolicyGradient("reinforce", entropy_coef=1.0), advantages=torch.zeros(N))
    out.loss.backward()
    dense.loss.backward()
    assert 0 < out.metrics["filtered_norm"] <= 0.3
    torch.testing.assert_close(inputs[0].grad[: N // 2], inputs[1].grad[: N // 2])


def test_the_tail_matters_in_dx(monkeypatch):
    """Without its mean the error is several times as large: the head's rows share a direction."""
    plan = replace(PLAN, filter=sk.Filter(1 / 4, 9.0))
    dense, found = gradients(None)[1]["dx"], gradients(plan)[1]["dx"]
    with_tail = relative(found, dense)
    init = Filtered.__init__

    def without_tail(self, *arguments):
        init(self, *arguments)
        self.tail.zero_()

    monkeypatch.setattr(Filtered, "__init__", without_tail)
    without = relative(gradients(plan)[1]["dx"], dense)
    assert without > 3 * with_tail


def test_frozen_parts():
    x, w, _, y = peaked()
    dense = sk.linear_loss(x.requires_grad_(), w, y, sk.sft())
    out = sk.linear_loss(x, w, y, sk.sft(), plan=PLAN)
    (found,), (expected,) = torch.autograd.grad(out.loss, [x]), torch.autograd.grad(dense.loss, [x])
    assert 0.01 < relative(found, expected) < 0.2


def test_padded_vocabulary():
    _, found = gradients(PLAN, vocab_size=V - 100)
    assert found["dW"][V - 100 :].abs().max() == 0 and found["db"][V - 100 :].abs().max() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sk.Filter(0), r"Filter\(columns=0\): expected a number in \(0, 1\]"),
        (lambda: sk.Filter(max_relative_error=-1), "max_relative_error"),
        (lambda: sk.Plan(filter=0.1), r"Plan\(filter=0\.1\): expected a Filter"),
        (lambda: sk.Plan(filter=sk.Filter(), batch_invariant=True), "batch_invariant"),
    ],
)
def test_impossible_filters(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 70, 9), (130, 33, 140), (300, 64, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no bf16 products
def test_the_device_decides(shape, dtype):
    """The Triton product that runs, or does not, by a number on the device."""
    pytest.importorskip("triton")
    from srft_kernels.rows.triton_residual import add_product_

    m, k, n = shape
    a, b = torch.randn(k, m).to(dtype).t(), torch.randn(k, n).to(dtype)
    for c in (torch.randn(m, n), torch.randn(m, n).to(dtype), torch.randn(n, m).t()):
        before = c.clone()
        assert torch.equal(add_product_(c, a, b, torch.tensor(False)), before)
        expected = before.double() + a.double() @ b.double()
        torch.testing.assert_close(
            add_product_(c, a, b, torch.tensor(True)).double(), expected, rtol=2 * torch.finfo(c.dtype).eps, atol=1e-4
        )


@pytest.mark.parametrize("size", [1e19, 1e-23])
def test_squares_that_leave_the_type_make_the_chunk_dense(size):
    """∞ ≤ ∞ and 0 ≤ 0 say nothing about a bound."""
    weight = torch.full((N,), size)
    plan = replace(PLAN, filter=sk.Filter(1 / 100, 1e-3))
    (_, found), (_, dense) = (gradients(p, token_weight=weight) for p in (plan, replace(plan, filter=None)))
    for name in dense:
        torch.testing.assert_close(found[name], dense[name], rtol=1e-4, atol=1e-4 * float(dense[name].abs().max()))
