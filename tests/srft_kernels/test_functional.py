"""The public functions as PyTorch citizens: gradients in fp64, PyTorch's own cross-entropy, shapes, types, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import srft_kernels as sk

from .cases import BACKENDS, IGNORED, problem

F64 = torch.float64
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "temperature": {"temperature": 0.6},
    "padded": {"vocab_size": 9},
    "all": {"bias": True, "softcap": 1.5, "temperature": 0.6, "vocab_size": 9},
}


def small(head: str = "plain", shape=(5,), hidden: int = 4, vocab: int = 11, dtype=F64):
    """(x, W, y, options) with an ignored token; options hold linear_bias where the head has one."""
    generator = torch.Generator().manual_seed(3)
    x, w, b = (
        torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()
        for size in ((*shape, hidden), (vocab, hidden), (vocab,))
    )
    options = dict(HEADS[head])
    y = torch.randint(options.get("vocab_size", vocab), shape, generator=generator)
    y.view(-1)[1] = IGNORED
    if options.pop("bias", False):
        options["linear_bias"] = b
    return x, w, y, options


def gradcheck(function, x: Tensor, w: Tensor, options: dict) -> None:
    b = options.pop("linear_bias", None)
    inputs = (x, w) if b is None else (x, w, b)
    assert torch.autograd.gradcheck(lambda x, w, b=None: function(x, w, linear_bias=b, **options), inputs)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_logprobs(head):
    x, w, y, options = small(head)
    plan = sk.Plan(chunk_rows=2, block_rows=1)
    gradcheck(lambda x, w, **o: sk.linear_logprobs(x, w, y, plan=plan, **o).fields(), x, w, options)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_loss(head, passes):
    x, w, y, options = small(head)

    def objective(stats, tokens):
        return tokens.a * stats.logprobs.exp() - stats.entropy.square() + 0.1 * stats.logsumexp

    plan, a = sk.Plan(chunk_rows=2, block_rows=1, passes=passes), torch.linspace(-1, 2, 5, dtype=F64)
    gradcheck(lambda x, w, **o: sk.linear_loss(x, w, y, objective, a=a, plan=plan, **o).loss, x, w, options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_cross_entropy(head, reduction):
    x, w, y, options = small(head)
    weight = torch.rand(options.get("vocab_size", 11), dtype=F64)
    more = {"reduction": reduction, "weight": weight, "label_smoothing": 0.2, "z_loss": 0.1}
    gradcheck(lambda x, w, **o: sk.linear_cross_entropy(x, w, y, **more, **o), x, w, options)


def test_logprobs_are_differentiable_any_way():
    """Arbitrary upstream gradients to each of the three fields, some tokens with none."""
    x, w, y, _ = small(shape=(2, 4))
    upstream = torch.randn(3, 2, 4, dtype=F64)
    upstream[:, 0, 2:] = 0
    for chunk_rows in (1, 3, 8):
        stats = sk.linear_logprobs(x, w, y, plan=sk.Plan(chunk_rows=chunk_rows))
        ours = torch.autograd.grad(stats.fields(), (x, w), list(upstream))
        logp = F.linear(x, w).log_softmax(-1)
        live = y != IGNORED
        fields = (
            logp.gather(-1, y.clamp(min=0)[..., None])[..., 0] * live,
            -(logp.exp() * logp).sum(-1) * live,
            F.linear(x, w).logsumexp(-1) * live,
        )
        torch.testing.assert_close(ours, torch.autograd.grad(fields, (x, w), list(upstream)))


@pytest.mark.parametrize("field", [0, 1, 2])
def test_one_field_alone(field):
    x, w, y, _ = small()
    alone = torch.autograd.grad(sk.linear_logprobs(x, w, y).fields()[field].sum(), (x, w))
    stats = sk.linear_logprobs(x, w, y).fields()
    together = torch.autograd.grad(sum((i == field) * s.sum() for i, s in enumerate(stats)), (x, w))
    torch.testing.assert_close(alone, together)


def test_upstream_without_gradient():
    """A consumer that hands back no gradient at all is not an error."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, w, y, _ = small()
    Silent.apply(sk.linear_logprobs(x, w, y).logprobs).sum().backward()
    assert x.grad is None or (x.grad == 0).all()


# --------------------------------------------------------------------------------------------- PyTorch's cross-entropy


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_torch_cross_entropy(reduction, label_smoothing, weighted, z_loss):
    x, w, y, options = small("bias", shape=(9,))
    bias = options["linear_bias"]
    upstream = torch.randn(9, dtype=F64) if reduction == "none" else torch.tensor(1.7, dtype=F64)
    same = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": torch.rand(11, dtype=F64) * weighted
            if weighted else None}  # fmt: skip
    ours = sk.linear_cross_entropy(x, w, y, linear_bias=bias, z_loss=z_loss, plan=sk.Plan(chunk_rows=2), **same)
    logits = F.linear(x, w, bias)
    reference = F.cross_entropy(logits, y, **same)
    if z_loss:
        square = z_loss * logits.logsumexp(-1).square() * (y != IGNORED)
        total = same["weight"][y.clamp(min=0)][y != IGNORED].sum() if weighted else (y != IGNORED).sum()
        reference = reference + (
            square if reduction == "none" else square.sum() / (total if reduction == "mean" else 1)
        )
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, w, bias), upstream), torch.autograd.grad(reference, (x, w, bias), upstream)
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("shape", [(), (6,)])
def test_is_a_drop_in_for_torch_linear_cross_entropy(shape):
    x, w, _, _ = small(shape=(6,))
    x, y = (x, torch.arange(6)) if shape else (x[0], torch.tensor(3))
    vector = torch.rand(11, dtype=F64)
    for options in (
        {},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": vector},
        {"linear_bias": vector},
        {"ignore_index": None},
        {"ignore_index": 3} if shape else {},
    ):
        torch.testing.assert_close(
            sk.linear_cross_entropy(x, w, y, **options), F.linear_cross_entropy(x, w, y, **options)
        )
    assert sk.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passes", [1, 2])
def test_result_types(dtype, passes):
    """Statistics and losses are fp32 (fp64 for fp64); each gradient has the type of its tensor."""
    p = problem("bias", dtype=dtype)
    x, w, b = p.leaves()
    out = sk.linear_loss(x, w, p.target, sk.sft(), linear_bias=b, plan=sk.Plan(passes=passes))
    out.loss.backward()
    wide = F64 if dtype == F64 else torch.float32
    assert {out.loss.dtype, out.logprobs.dtype, out.entropy.dtype, out.logsumexp.dtype} == {wide}
    assert {x.grad.dtype, w.grad.dtype, b.grad.dtype} == {dtype}


# ------------------------------------------------------------------------------------------------- shapes and strides


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(shape):
    x, w = torch.randn(*shape, 4, requires_grad=True), torch.randn(7, 4)
    y, a = torch.randint(7, shape), torch.randn(shape)
    out = sk.linear_loss(x, w, y, sk.reinforce(), advantages=a)
    flat = sk.linear_loss(x.reshape(-1, 4), w, y.reshape(-1), sk.reinforce(), advantages=a.reshape(-1))
    assert out.logprobs.shape == out.entropy.shape == out.logsumexp.shape == shape and out.loss.shape == ()
    assert out.loss == flat.loss and (out.logprobs.flatten() == flat.logprobs).all()
    assert torch.autograd.grad(out.loss, x)[0].shape == x.shape
    assert sk.linear_logprobs(x, w, y).entropy.shape == shape
    assert sk.linear_cross_entropy(x, w, y, reduction="none").shape == shape


STRIDES = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other": lambda t: t.repeat_interleave(2, 0)[::2],
    "column_slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("stride", STRIDES)
def test_strides(stride, passes):
    x, w, y, _ = small()
    plan = sk.Plan(chunk_rows=2, passes=passes)

    def run(x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        out = sk.linear_loss(x, w, y, sk.sft(), plan=plan)
        return out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, (x, w))

    strided = STRIDES[stride](x.detach()), STRIDES[stride](w.detach())
    torch.testing.assert_close(run(*strided), run(*(t.contiguous() for t in strided)))


def test_gradients_flow_through_views_and_expansion():
    base = torch.randn(4, dtype=F64, requires_grad=True)
    w = torch.randn(7, 4, dtype=F64)
    y = torch.randint(7, (2, 3))
    sk.linear_cross_entropy((base * 2).expand(2, 3, 4), w, y).backward()
    ours, base.grad = base.grad, None
    F.cross_entropy(F.linear((base * 2).expand(6, 4), w), y.flatten()).backward()
    torch.testing.assert_close(ours, base.grad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_target_types(dtype):
    """Targets of any integer type; ignore_index = −100 does not wrap around to 156 in uint8."""
    x, w, y = torch.randn(3, 4), torch.randn(200, 4), torch.tensor([5, 100, 120])
    if dtype == torch.uint8:
        y[2] = 156
    loss = sk.linear_cross_entropy(x, w, y.to(dtype))
    assert loss == sk.linear_cross_entropy(x, w, y)
    assert (sk.linear_logprobs(x, w, y.to(dtype)).logprobs != 0).all()
    assert (sk.linear_loss(x, w, y.to(dtype), sk.sft()).logprobs != 0).all()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_never_modified(backend, passes):
    p = problem("everything")
    leaves = p.leaves()
    n = len(p.target)
    columns = {"advantages": torch.randn(n), "is_demo": torch.arange(n) % 2 == 0, "rewards": torch.ones(n)}
    arguments = [*leaves, p.target, *columns.values(), weight := torch.rand(n)]
    before = [(t.detach().clone(), t._version) for t in arguments]
    out = sk.linear_loss(
        leaves[0], leaves[1], p.target, sk.srft_paper(entropy_coef=0.1), linear_bias=leaves[2], token_weight=weight,
        plan=sk.Plan(backend=backend, passes=passes, chunk_rows=64), **columns, **p.head,
    )  # fmt: skip
    (out.loss * 3).backward()
    for tensor, (copy, version) in zip(arguments, before):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()) and tensor._version == version


# ------------------------------------------------------------------------------------------------- which tokens count


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", [(4,), (0,), (0, 3), (2, 0)], ids=str)
def test_no_live_token(shape, passes):
    """A loss of exactly 0, with gradients of exactly 0."""
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((*shape, 4), (7, 4), (7,)))
    y = torch.full(shape, IGNORED)
    plan = sk.Plan(passes=passes)
    for loss in (
        sk.linear_loss(x, w, y, sk.sft(), linear_bias=b, plan=plan).loss,
        sk.linear_cross_entropy(x, w, y, linear_bias=b, plan=plan),
        sk.linear_cross_entropy(x, w, y, linear_bias=b, plan=plan, label_smoothing=0.1, weight=torch.rand(7)),
        sk.linear_cross_entropy(x, w, y, linear_bias=b, plan=plan, reduction="none").sum(),
        sum(field.sum() for field in sk.linear_logprobs(x, w, y, linear_bias=b, plan=plan).fields()),
    ):
        assert loss == 0 and loss.dtype == torch.float32
        for tensor, grad in zip((x, w, b), torch.autograd.grad(loss, (x, w, b))):
            assert grad.shape == tensor.shape and (grad == 0).all()


def test_ignore_index():
    x, w, y, _ = small()
    other = torch.where(y == IGNORED, 3, y)
    everything = sk.linear_loss(x, w, other, sk.sft(), ignore_index=None)
    assert (everything.logprobs != 0).all()
    some = sk.linear_loss(x, w, other, sk.sft(), ignore_index=3)
    assert ((some.logprobs == 0) == (other == 3)).all()
    torch.testing.assert_close(some.loss, F.cross_entropy(F.linear(x, w), other, ignore_index=3))


def test_token_weight():
    x, w, y, _ = small()
    weight = torch.tensor([0.5, 9.0, -1.0, 0.0, 2.0], dtype=F64)
    out = sk.linear_loss(x, w, y, sk.sft(), token_weight=weight)
    torch.testing.assert_close(out.loss.detach(), -(out.logprobs * weight).sum())
    assert out.logprobs[3] != 0, "a token of weight 0 is still scored"


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("objective", [sk.sft(), sk.srft_official(), sk.srft_hpt()], ids=["sft", "official", "hpt"])
def test_training_follows_the_reference(objective, passes):
    """Ten steps of a small model: the same losses as with full logits, to 1e-4 relative."""
    if passes == 1 and not getattr(objective, "token_local", lambda given: True)(()):
        passes = None
    n, generator = 48, torch.Generator().manual_seed(5)
    inputs, y = torch.randn(n, 12, generator=generator), torch.randint(97, (n,), generator=generator)
    y[::7] = IGNORED
    columns = {"advantages": torch.randn(n, generator=generator), "rewards": (torch.arange(n) % 3).float(),
               "is_demo": torch.arange(n) < 24, "sequence_ids": torch.arange(n) // 12}  # fmt: skip
    plan = sk.Plan(chunk_rows=16, passes=passes)

    def train(loss_function, **options) -> Tensor:
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 16))
        head = torch.nn.Linear(16, 97)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)
        losses = []
        for _ in range(10):
            out = loss_function(
                body(inputs), head.weight, y, objective, linear_bias=head.bias, temperature=0.9, softcap=20.0,
                **columns, **options,
            )  # fmt: skip
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.detach())
        return torch.stack(losses)

    ours, reference = train(sk.linear_loss, plan=plan), train(sk.reference.linear_loss)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=0)
    assert ours[-1] < ours[0] - 0.1


def test_the_specification_refuses_what_it_does_not_compute():
    x, w, y = torch.randn(4, 8), torch.randn(20, 8), torch.arange(4)
    with pytest.raises(TypeError, match=r"linear_logprobs\(\) got an unexpected keyword argument 'tempreature'"):
        sk.reference.linear_logprobs(x, w, y, tempreature=2.0)
    with pytest.raises(ValueError, match=r"srft_kernels\.reference does not compute extras: leave it out"):
        sk.reference.linear_logprobs(x, w, y, extras=sk.Extras(rank=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'soft_cap'"):
        sk.reference.linear_distillation(x, w, x, w, soft_cap=2.0)
