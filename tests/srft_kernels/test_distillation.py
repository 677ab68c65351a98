"""Divergences between two heads against fp64, no further off than twice eager PyTorch, and what else they promise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import srft_kernels as sk

from . import cases
from .counting import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@dataclass(frozen=True)
class Pair:
    """A student and a teacher of one vocabulary, the tokens that take part, and their weights."""

    student: cases.Problem
    teacher: cases.Problem
    mask: Tensor
    weight: Tensor

    def arguments(self, leaves: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        options = {
            "linear_bias": leaves[2] if len(leaves) == 3 else None,
            "teacher_bias": self.teacher.bias,
            "temperature": self.student.head.get("temperature", 1.0),
            "teacher_temperature": self.teacher.head.get("temperature", 1.0),
            "logit_scale": self.student.head.get("logit_scale", 1.0),
            "teacher_logit_scale": self.teacher.head.get("logit_scale", 1.0),
            "softcap": self.student.head.get("softcap"),
            "teacher_softcap": self.teacher.head.get("softcap"),
            "vocab_size": self.vocab,
            "mask": self.mask,
            "token_weight": self.weight,
        }
        return (leaves[0], leaves[1], self.teacher.input, self.teacher.weight), options

    @property
    def vocab(self) -> int | None:
        return min(len(p.weight[: p.head.get("vocab_size")]) for p in (self.student, self.teacher))


def pair(
    student: str = "gaussian", teacher: str = "gaussian", vocab: int = 131, dtype=torch.float32, tokens: int = 13
) -> Pair:
    made = cases.problem(student, tokens, vocab=vocab, dtype=dtype)
    other = cases.problem(teacher, tokens, hidden=24, vocab=vocab, dtype=dtype, seed=1)
    n = torch.arange(len(made.target))
    return Pair(made, other, n % 4 != 2, (n % 3 + 1) / 8)


def log_probs(p: cases.Problem, leaves: list[Tensor], vocab: int, dtype: torch.dtype) -> Tensor:
    z = F.linear(leaves[0], leaves[1][:vocab], leaves[2][:vocab] if len(leaves) == 3 else None).to(dtype)
    return cases.scored(z, p.head).log_softmax(-1)


def formula(divergence: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """Straight from the definitions, with 0 · log 0 = 0; p and q are log-probabilities (n, V)."""
    kl = lambda p, q: (p.exp() * (p - q).masked_fill(p.exp() == 0, 0)).sum(-1)  # noqa: E731
    if divergence == "forward_kl":
        return kl(q, p)
    if divergence == "reverse_kl":
        return kl(p, q)
    absent = (p == -torch.inf) & (q == -torch.inf)  # where logsumexp has no derivative
    m = torch.stack([p.masked_fill(absent, 0) + log(1 - beta), q.masked_fill(absent, 0) + log(beta)]).logsumexp(0)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def expected(pair: Pair, divergence: str, beta: float, dtype: torch.dtype | None, softmax: torch.dtype) -> cases.Result:
    leaves = pair.student.leaves(dtype)
    with torch.no_grad():
        q = log_probs(pair.teacher, pair.teacher.leaves(dtype), pair.vocab, softmax)
    found = formula(divergence, beta, log_probs(pair.student, leaves, pair.vocab, softmax)[pair.mask], q[pair.mask])
    return result(found, (found * pair.weight[pair.mask].to(softmax)).sum(), leaves)


def result(divergence: Tensor, loss: Tensor, leaves: list[Tensor]) -> cases.Result:
    grads = dict(zip(("dx", "dW", "db"), torch.autograd.grad(loss, leaves)))
    return cases.Result({"divergence": divergence.detach(), "loss": loss.detach(), **grads})


def ours(pair: Pair, divergence: str, beta: float, plan: sk.Plan | None) -> cases.Result:
    leaves = pair.student.leaves()
    arguments, options = pair.arguments(leaves)
    out = sk.linear_distillation(*arguments, divergence=divergence, beta=beta, plan=plan, **options)
    assert (out.divergence[~pair.mask] == 0).all()
    return result(out.divergence[pair.mask], out.loss, leaves)


def check(pair: Pair, divergence: str, backend: str, beta: float = 0.3, chunks: tuple[int, ...] = (1, 5, 64)) -> None:
    truth = expected(pair, divergence, beta, torch.float64, torch.float64)
    if divergence == "reverse_kl":  # where it is infinite it has no gradient
        mask = pair.mask.clone()
        mask[pair.mask] = truth.values["divergence"].isfinite()
        pair = replace(pair, mask=mask)
        truth = expected(pair, divergence, beta, torch.float64, torch.float64)
    eager = expected(pair, divergence, beta, None, torch.float32)
    for plan in cases.plans(backend, chunks=chunks):
        cases.assert_exact(ours(pair, divergence, beta, plan), eager, truth, plan)


@divergences
@pytest.mark.parametrize("kind", cases.KINDS)
def test_exact(kind, divergence):
    for student, teacher in ((kind, "gaussian"), ("random", kind), (kind, kind)):
        check(pair(student, teacher), divergence, "torch")


# Where the cap saturates its slope is as good as triton_rows' tanh, which is held to the rule there.
@divergences
@pytest.mark.parametrize("kind", [kind for kind in cases.KINDS if kind != "softcap_saturated"])
def test_exact_in_triton(kind, divergence):
    # of a few tokens the largest error, ours or eager's, is chance: which one is larger depends on the BLAS at hand
    for tokens in (24, 48):
        check(pair(kind, "gaussian", tokens=tokens), divergence, "triton", chunks=(64,))
        check(pair("random", kind, tokens=tokens), divergence, "triton", chunks=(64,))


@backends
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["peaked", "huge_1e4", "scale_huge", "flat"])
def test_jensen_shannon_of_a_sure_student_or_of_its_like(kind, beta, backend):
    """log p/M less its mean is small there: it must not be what the rounding of two larger numbers leaves."""
    for tokens in (12, 24, 48):
        check(pair(kind, "gaussian", tokens=tokens), "jensen_shannon", backend, beta, chunks=(64,))
        check(pair(kind, kind, tokens=tokens), "jensen_shannon", backend, beta, chunks=(64,))


@backends
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.999])
def test_jensen_shannon_of_a_peaked_row_is_as_exact_as_it_is_small(beta, backend):
    """Of students within 1e-2 … 1e-8 of one-hot, or of two entries alike: what fp32 rounds log p/m to at the entry that
    they choose must be in no other entry's derivative, and that one's own is as small as theirs."""
    z, teacher = torch.randn(2, 64, 9, generator=torch.Generator().manual_seed(0))
    z[:, 0] += torch.linspace(7, 22, 64)
    z[1::2, 1] = z[1::2, 0]
    teacher[::3, :2] = z[::3, :2] - 4  # of one mind with the student, more or less
    x, one = z.clone().requires_grad_(), torch.eye(9)  # the logits are x, and so is their gradient
    loss = sk.linear_distillation(x, one, teacher, one, divergence="jensen_shannon", beta=beta,
                                  token_weight=torch.ones(64), plan=sk.Plan(backend=backend)).loss  # fmt: skip
    z, q = z.double().requires_grad_(), teacher.double().log_softmax(-1)
    truth = torch.autograd.grad(formula("jensen_shannon", beta, z.log_softmax(-1), q).sum(), z)[0]
    error = (torch.autograd.grad(loss, x)[0] - truth).abs().amax(-1)
    assert (error < 1e-5 * truth.abs().amax(-1)).all()


@divergences
@pytest.mark.parametrize("kind", ["peaked", "banned", "everything"])
def test_many_blocks_in_triton(kind, divergence, monkeypatch):
    triton = pytest.importorskip("srft_kernels.distillation.triton_rows")
    monkeypatch.setattr(triton, "MAX_BLOCK", 32)
    check(pair(kind, "gaussian", tokens=6), divergence, "triton", chunks=(64,))
    check(pair("gaussian", kind, tokens=3), divergence, "triton", chunks=(64,))


@divergences
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "peaked", "banned", "everything"])
def test_exact_in_16_bits(kind, dtype, backend, divergence):
    check(pair(kind, "gaussian", dtype=dtype, tokens=5), divergence, backend, chunks=(4,))


@divergences
@pytest.mark.parametrize("vocab", [1, 2, 17, 1021])
def test_odd_vocabularies(vocab, divergence):
    check(pair(vocab=vocab), divergence, "torch", chunks=(4,))


@divergences
def test_the_specification_is_the_formula(divergence):
    for kind in ("gaussian", "everything"):
        p = pair(kind, "banned", dtype=torch.float64)
        p = replace(p, teacher=replace(p.teacher, head={**p.teacher.head, "logit_scale": 0.6}))
        leaves = p.student.leaves()
        arguments, options = p.arguments(leaves)
        out = sk.reference.linear_distillation(*arguments, divergence=divergence, beta=0.3, **options)
        truth = expected(p, divergence, 0.3, torch.float64, torch.float64)
        for name, value in result(out.divergence[p.mask], out.loss, leaves).values.items():
            torch.testing.assert_close(value, truth.values[name], equal_nan=True)


@backends
def test_each_head_s_scale_rounds_as_eager(backend):
    """A teacher who is sure of entry 0, a student whose entry 1 is far above: KL(q ‖ p) is that logit, bit for bit."""
    x, sure = torch.linspace(4e4, 9e4, 200)[:, None], torch.full((200, 1), 300.0)
    out = sk.linear_distillation(x, torch.tensor([[0.0], [1.0]]), sure, torch.tensor([[1.0], [0.0]]), temperature=0.7,
                                 logit_scale=2.3, teacher_logit_scale=0.7, plan=sk.Plan(backend))  # fmt: skip
    assert torch.equal(out.divergence, x[:, 0] * 2.3 / 0.7)


@divergences
def test_gradients_are_derivatives(divergence):
    """Against finite differences, which know nothing of anybody's formula."""
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (7, 4), (7,)))
    teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)

    def loss(x, w, b):
        return sk.linear_distillation(x, w, *teacher, linear_bias=b, divergence=divergence, beta=0.2, temperature=1.5,
                                      softcap=3.0, plan=sk.Plan(chunk_rows=2)).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, w, b))


@backends
@divergences
def test_reductions_and_weights(backend, divergence):
    p, plan, n = pair(tokens=4), sk.Plan(backend=backend, chunk_rows=3), torch.arange(4)
    x, w = p.student.leaves()
    teacher = p.teacher.input, p.teacher.weight
    run = lambda **options: sk.linear_distillation(x, w, *teacher, divergence=divergence, plan=plan, **options)  # noqa: E731
    each = run().divergence
    torch.testing.assert_close(run().loss, each.mean())
    torch.testing.assert_close(run(mask=p.mask).loss, each[p.mask].mean())
    torch.testing.assert_close(run(token_weight=p.weight).loss, (each * p.weight).sum())
    torch.testing.assert_close(run(token_weight=p.weight * p.mask).divergence, each)  # a weight of 0 is still reported
    # one token's weight is what an upstream gradient of that token would be
    rows = [torch.autograd.grad(run(token_weight=1.0 * (n == i)).loss, (x, w)) for i in range(4)]
    whole = torch.autograd.grad(run(token_weight=p.weight).loss * 3, (x, w))
    for i in range(2):
        torch.testing.assert_close(whole[i], 3 * sum(g[i] * weight for g, weight in zip(rows, p.weight)))


@backends
@divergences
@pytest.mark.parametrize("compact", [True, False])
def test_masked_tokens_take_no_part(compact, divergence, backend):
    """Not even with hidden states that are no numbers, left out or worked through; and any shape of tokens will do."""
    p, plan = pair(tokens=6), sk.Plan(backend=backend, chunk_rows=4, compact=compact)
    x, w = p.student.leaves()
    options = {"divergence": divergence, "plan": plan}
    other = torch.where(p.mask[:, None], p.teacher.input, torch.inf)
    broken = torch.where(p.mask[:, None], x.detach(), torch.nan).reshape(1, 6, -1).requires_grad_()
    out = sk.linear_distillation(
        broken, w, other[None], p.teacher.weight, mask=p.mask[None], token_weight=p.weight[None], **options
    )
    kept = sk.linear_distillation(
        x[p.mask], w, p.teacher.input[p.mask], p.teacher.weight, token_weight=p.weight[p.mask], **options
    )
    torch.testing.assert_close(out.divergence[0, p.mask], kept.divergence)
    assert (out.divergence[0, ~p.mask] == 0).all()
    torch.testing.assert_close(out.loss, kept.loss)
    dx, dw = torch.autograd.grad(out.loss, (broken, w))
    assert (dx[0, ~p.mask] == 0).all()
    torch.testing.assert_close(dw, torch.autograd.grad(kept.loss, w)[0])


@backends
@pytest.mark.parametrize("compact", [True, False])
def test_a_weight_of_0_silences_an_infinite_divergence(compact, backend):
    x, w, plan = torch.ones(2, 1), torch.tensor([[0.0], [1.0]]), sk.Plan(backend=backend, compact=compact)
    z, ban = w.clone().requires_grad_(), torch.tensor([0.0, -torch.inf])
    for divergence in ("forward_kl", "reverse_kl"):
        bias = {"forward_kl": "linear_bias", "reverse_kl": "teacher_bias"}[divergence]
        out = sk.linear_distillation(
            x, z, x, w, divergence=divergence, token_weight=torch.zeros(2), plan=plan, **{bias: ban}
        )
        assert (out.divergence == torch.inf).all() and out.loss == 0
        assert (torch.autograd.grad(out.loss, z)[0] == 0).all()


@divergences
def test_no_token(divergence):
    p = pair("bias")
    leaves = p.student.leaves()
    out = sk.linear_distillation(*p.arguments(leaves)[0], linear_bias=leaves[2], divergence=divergence,
                                 mask=torch.zeros(13, dtype=torch.bool))  # fmt: skip
    assert out.loss == 0 and (out.divergence == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves))


@backends
@divergences
def test_of_itself(backend, divergence):
    p = cases.problem("peaked", ignored=0)
    leaves = p.leaves()
    out = sk.linear_distillation(*leaves, p.input, p.weight, divergence=divergence, plan=sk.Plan(backend=backend))
    assert (out.divergence == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves))


def test_ends_of_jensen_shannon():
    """arXiv 2306.13649: JSD_β / β → KL(q ‖ p) for β → 0; and, mirrored, JSD_β / (1 − β) → KL(p ‖ q) for β → 1."""
    p = pair(dtype=torch.float64)
    tensors = (p.student.input, p.student.weight, p.teacher.input, p.teacher.weight)
    run = lambda *tensors, **options: sk.linear_distillation(*tensors, **options).divergence  # noqa: E731
    near = lambda beta: run(*tensors, divergence="jensen_shannon", beta=beta)  # noqa: E731
    torch.testing.assert_close(near(1e-7) / 1e-7, run(*tensors), rtol=1e-4, atol=0)
    torch.testing.assert_close(near(1 - 1e-7) / 1e-7, run(*tensors, divergence="reverse_kl"), rtol=1e-4, atol=0)
    mirrored = run(*tensors[2:], *tensors[:2], divergence="jensen_shannon", beta=0.7)
    torch.testing.assert_close(near(0.3), mirrored)
    assert (near(0.5) <= log(2)).all() and (near(0.3) > 0).all()


@backends
def test_infinite_divergences(backend):
    """Banned by one head alone. KL(q ‖ p) keeps its gradient p − q; Jensen–Shannon is finite always."""
    x, w, plan = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [2.0]]), sk.Plan(backend=backend)
    ban = torch.tensor([0.0, 0.0, -torch.inf])
    p, q = (w[:, 0] + ban).softmax(0), w[:, 0].softmax(0)
    z = w.clone().requires_grad_()
    run = lambda divergence, **bias: sk.linear_distillation(x, z, x, w, divergence=divergence, plan=plan, **bias).loss  # noqa: E731
    loss = run("forward_kl", linear_bias=ban)
    assert loss == torch.inf
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0][:, 0], p - q)
    assert run("reverse_kl", teacher_bias=ban) == torch.inf
    torch.testing.assert_close(run("reverse_kl", linear_bias=ban), (p[:2] * (p[:2] / q[:2]).log()).sum())
    torch.testing.assert_close(run("forward_kl", teacher_bias=ban), (p[:2] * (p[:2] / q[:2]).log()).sum())
    for bias in ({"linear_bias": ban}, {"teacher_bias": ban}, {"linear_bias": ban, "teacher_bias": ban}):
        loss = run("jensen_shannon", **bias)
        assert 0 <= loss < log(2) and torch.autograd.grad(loss, z)[0].isfinite().all()


@backends
def test_a_mixture_too_small_for_fp32(backend):
    """q is the smallest number there is and p is 0: their mixture is 0 too, and q / 0 must not be looked at."""
    student, teacher = torch.tensor([[0.0], [-300.0]]), torch.tensor([[0.0], [-103.2]])
    assert torch.tensor(-103.2).exp() > 0 == torch.tensor(-103.2).exp() / 2
    out = sk.linear_distillation(torch.ones(1, 1), student, torch.ones(1, 1), teacher, divergence="jensen_shannon",
                                 plan=sk.Plan(backend=backend))  # fmt: skip
    assert abs(out.loss) < 1e-40


@backends
def test_temperature_is_not_squared_into_the_loss(backend):
    p = pair()
    x, w = p.student.leaves()
    teacher = p.teacher.input, p.teacher.weight
    out = sk.linear_distillation(x, w, *teacher, temperature=3.0, plan=sk.Plan(backend=backend))
    student, teacher = ((a @ b.t() / 3).log_softmax(-1) for a, b in ((x, w), teacher))
    eager = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(out.loss, eager)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (x, w)), torch.autograd.grad(eager, (x, w)))


def test_heads_with_different_padding():
    p = pair()
    x, w, *teacher = p.arguments(p.student.leaves())[0]
    padded = torch.cat([teacher[1], torch.full((5, 24), torch.nan)])
    out = sk.linear_distillation(x, w, teacher[0], padded, vocab_size=131)
    assert torch.equal(out.loss, sk.linear_distillation(x, w, *teacher).loss)
    with pytest.raises(ValueError, match=r"linear_weight has 131 rows and teacher_weight 136: .* need vocab_size="):
        sk.linear_distillation(x, w, teacher[0], padded)
    with pytest.raises(ValueError, match=r"vocab_size must be an integer in \[1, 131\]"):
        sk.linear_distillation(x, w, teacher[0], padded, vocab_size=132)


def test_types_of_the_heads_may_differ():
    p = pair()
    x, w, *teacher = p.arguments(p.student.leaves())[0]
    narrow = [t.bfloat16() for t in teacher]
    out = sk.linear_distillation(x, w, *narrow)
    torch.testing.assert_close(out.loss, sk.linear_distillation(x, w, *(t.float() for t in narrow)).loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = sk.linear_distillation(x, w.bfloat16(), *teacher)
    out.loss.backward()
    assert (out.loss.dtype, x.grad.dtype) == (torch.float32, torch.float32)


N, H, TEACHER, V = 96, 4, 6, 300


@divergences
def test_cost(divergence):
    """No block of N·V; 2NV(3H + H_teacher) flops, less what nobody wants; the teacher never gets a gradient."""

    def run(*wanted, grad=True, **options):
        tensors = [torch.randn(*s) for s in ((N, H), (V, H), (N, TEACHER), (V, TEACHER))]
        for i in wanted:
            tensors[i].requires_grad_()
        plan = sk.Plan(chunk_rows=8, block_rows=4)
        with torch.set_grad_enabled(grad), Recorder() as forward:
            loss = sk.linear_distillation(*tensors, divergence=divergence, plan=plan, **options).loss
        assert forward.largest == 8 * 304 < N * V / 10
        if loss.requires_grad:
            with Recorder() as backward:
                loss.backward()
            assert backward.flops == 0
        assert [i for i, t in enumerate(tensors) if t.grad is not None] == [i for i in wanted if i < 2 and grad]
        return forward.flops

    score = 2 * N * V * (H + TEACHER)
    assert run(0, 1) == run(0, 1, 2, 3) == score + 2 * 2 * N * V * H
    assert run(0) == run(1) == score + 2 * N * V * H
    assert run() == run(2, 3) == run(0, 1, grad=False) == score
    assert run(0, 1, mask=torch.arange(N) % 4 == 0) == (score + 2 * 2 * N * V * H) // 4
    assert run(0, 1, token_weight=1.0 * (torch.arange(N) % 4 == 0)) == score + 2 * 2 * N * V * H // 4


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', 'reverse_kl', 'jensen_shannon'"),
        ({"beta": 0.0}, ValueError, "beta must lie between 0 and 1, found 0.0: .* use divergence='forward_kl'"),
        ({"teacher_weight": None}, TypeError, "teacher_weight must be a tensor, found NoneType"),
        ({"teacher_input": torch.zeros(3, 4)}, ValueError, r"teacher_input must be \(\.\.\., H\) with H = 5"),
        ({"teacher_input": torch.zeros(4, 5)}, ValueError, r"must hold the tokens of input, \(3,\), found \(4,\)"),
        ({"teacher_bias": torch.zeros(6)}, ValueError, r"teacher_bias must be \(V,\) = \(7,\), found shape \(6,\)"),
        ({"teacher_input": torch.zeros(3, 5).double()}, TypeError, "teacher_weight is torch.float32 but teacher_input"),
        ({"teacher_input": torch.zeros(3, 5).double(), "teacher_weight": torch.zeros(7, 5).double()}, TypeError,
         "input is torch.float32 and teacher_input torch.float64: cast one"),
        ({"beta": None}, ValueError, "beta must lie between 0 and 1, found None"),
        ({"logit_scale": -1.0}, ValueError, r"^logit_scale must be a positive number, found -1\.0"),
        ({"teacher_logit_scale": 0}, ValueError, "teacher_logit_scale must be a positive number, found 0"),
        ({"teacher_logit_scale": None}, ValueError, "teacher_logit_scale must be a positive number, found None"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be a positive number, found 0.0"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be boolean, found torch.float32"),
        ({"mask": torch.ones(2) > 0}, ValueError, r"mask must be shaped like input .* \(3,\), found \(2,\)"),
        ({"token_weight": torch.ones(2)}, ValueError, r"token_weight must be shaped like input .* found \(2,\)"),
        ({"group": object()}, ValueError, r"linear_distillation\(group=...\) is not supported: .* drop group="),
        ({"plan": sk.Plan(passes=2)}, ValueError, r"distillation has one pass and no filter: use passes=None"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(7, 4),
        "teacher_input": torch.zeros(3, 5),
        "teacher_weight": torch.zeros(7, 5),
    }
    with pytest.raises(error, match=message):
        sk.linear_distillation(**{**arguments, **changes})
