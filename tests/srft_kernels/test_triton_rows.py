"""The Triton row kernels, run (in the interpreter where there is no GPU) and held to the same rules as PyTorch's."""

import os
from functools import partial

import pytest
import torch

import srft_kernels as sk
from srft_kernels import batch
from srft_kernels.head import Head, aligned, aligned_size
from srft_kernels.rows import tuning
from srft_kernels.rows.torch_rows import TorchRows

from . import cases
from .cases import buffer

triton_rows = pytest.importorskip("srft_kernels.rows.triton_rows")
TORCH, TRITON = TorchRows(8), triton_rows.TritonRows()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


ONE_BLOCK, MANY_BLOCKS = tuning.Launch(8192, 1), tuning.Launch(32, 1)  # of a row: MANY with maxima that rise


@pytest.fixture(params=[ONE_BLOCK, MANY_BLOCKS], ids=["one block", "many blocks"])
def blocks(request):
    """A row of 131 numbers in one loop step, or in five."""
    with tuning.forced(request.param):
        yield


def annotations(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n, generator=generator)
    advantages[::5] = 0
    return {
        "advantages": advantages,
        "rewards": torch.randint(2, (n,), generator=generator).float(),
        "is_demo": torch.rand(n, generator=generator) < 0.4,
        "old_logprobs": -4.9 + torch.randn(n, generator=generator) / 4,
        "ref_logprobs": -4.9 + torch.randn(n, generator=generator) / 4,
    }


MIXED = sk.PolicyGradient(kl_coef=0.05, entropy_coef=0.1)


FUSED = sk.PolicyGradient(surrogate="reinforce", entropy_coef=0.1)
CALLABLE = lambda stats, tokens: -tokens.advantages * stats.logprobs - 0.1 * stats.entropy  # noqa: E731


@pytest.mark.parametrize("objective, passes, launch", [
    (FUSED, 1, tuning.Launch(64, 1)), (CALLABLE, 1, tuning.Launch(64, 1)), (FUSED, 2, ONE_BLOCK),
], ids=["fused, blocks", "between two kernels, blocks", "two passes, one block"])  # fmt: skip
@pytest.mark.parametrize("kind", cases.KINDS)
def test_exact(kind, objective, passes, launch):
    """131 numbers in two whole blocks and three numbers, or in one block."""
    problem = cases.problem(kind)
    columns = {"advantages": annotations(len(problem.target))["advantages"]}
    truth, eager = (f(problem, CALLABLE, **columns) for f in (cases.truth, cases.eager))
    plan = sk.Plan(backend="triton", chunk_rows=5, passes=passes)
    with tuning.forced(launch):
        cases.assert_exact(cases.ours(problem, objective, plan, **columns), eager, truth)


# Each with several derivatives at a time: that options mean what they should is in test_triton_objectives.py.
OBJECTIVES = [
    sk.dft(entropy_coef=0.1),
    sk.CrossEntropy(z_loss=1e-2, kl_coef=0.1),
    sk.PolicyGradient(clip_low=None, clip_high=0.1, dual_clip=1.1, kl_coef=0.1, entropy_coef=0.1),
    sk.cispo(entropy_coef=0.1),
    sk.SRFT(entropy_sign=1, demo_weight="p(1-p)", surrogate="sapo", positive="reward", entropy_coef=0.1),
    sk.srft_paper(),
    sk.srft_official(),
    sk.luffy(),
    sk.chord(0.3, token_weighted=True),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_fused_objectives_are_the_pytorch_formulas(objective):
    """Device code with derivatives by hand against the formula that autograd differentiates, in a row's kernel."""
    n, vocab = 10, 48
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(1)) * 2
    columns = annotations(n)
    tokens, weight = sk.Tokens(torch.randint(vocab, (n,)), **columns), torch.rand(n)
    run = {
        name: cases.in_one_pass(rows, buffer(logits), tokens, weight, objective, Head())
        for name, rows in (("torch", TORCH), ("triton", TRITON))
    }
    for index in (1, 2):  # loss, gradient
        torch.testing.assert_close(run["triton"][index], run["torch"][index], rtol=2e-5, atol=1e-6)


SURE_HEADS = {
    "plain": {},
    "bias, scale, cap, temperature": {"bias": 0.25, "scale": 1.3, "softcap": 30.0, "temperature": 0.7},
    "smoothing, temperatures": {"smooth": 0.5, "temperature": torch.linspace(0.5, 1.5, 8)},
}


@pytest.mark.parametrize("launch", [ONE_BLOCK, tuning.Launch(16, 1)], ids=["one block", "blocks"])
@pytest.mark.parametrize("options", SURE_HEADS.values(), ids=SURE_HEADS)
def test_a_sure_target_keeps_what_the_other_derivatives_leave_there(options, launch):
    """p_y = 1: g (1 − p_y) is 0, and what is left of k, u and h is not rounded to the size of g."""
    n, vocab, eps = 8, 40, torch.finfo(torch.float32).eps
    sure = torch.arange(n) < n // 2
    logits = torch.randn(n, vocab) - torch.where(sure, 120.0, 9.0)[:, None]
    target = torch.arange(n) * 5
    logits[torch.arange(n), target] = 4 + torch.rand(n)
    weight = torch.full((n,), 0.7)
    coefs = (torch.full((n,), -0.7), torch.full((n,), 1e-3), torch.rand(n) * 1e-6, torch.rand(n) * 1e-7)

    def gradients(rows, dtype):
        room = lambda: buffer(logits.to(dtype))  # noqa: E731
        vectors = {name: aligned(torch.full((vocab,), options[name]) + torch.arange(vocab) / 64, dtype)
                   for name in ("bias", "smooth") if name in options}  # fmt: skip
        head = Head(**{**options, **vectors})
        given = [c.to(dtype) for c in (coefs if "smooth" in options else coefs[:3])]
        loss = sk.CrossEntropy(z_loss=1e-7, label_smoothing=1e-7 if "smooth" in options else 0.0)
        _, normalizer = rows.statistics(room(), target, head)
        yield cases.in_second_pass(rows, room(), target, normalizer, given, head)
        yield cases.in_one_pass(rows, room(), sk.Tokens(target), weight.to(dtype), loss, head)[2]

    with tuning.forced(launch):
        own = list(gradients(TRITON, torch.float32))
    usual, truth = (list(gradients(TORCH, dtype)) for dtype in (torch.float32, torch.float64))
    for found, eager, right in zip(own, usual, truth):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=4 * eps)
        at = lambda x: x[torch.arange(n), target]  # noqa: E731
        error, theirs = ((at(x).double() - at(right)).abs() for x in (found, eager))
        assert (at(right)[sure].abs() < 1e-4).all() and (at(right)[sure] != 0).all()
        assert (error <= 8 * eps * at(right).abs() + torch.where(sure, 0, 2 * theirs + eps)).all()


@pytest.mark.parametrize("class_weight", [False, True])
def test_label_smoothing(class_weight, blocks):
    x, w, y = torch.randn(9, 16), torch.randn(131, 16), torch.randint(131, (9,))
    classes = torch.rand(131) if class_weight else None
    results = []
    for backend in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        plan = sk.Plan(backend=backend, chunk_rows=4)
        loss = sk.linear_cross_entropy(*leaves, y, weight=classes, label_smoothing=0.1, z_loss=1e-3, plan=plan)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradient_beside_wide_logits(dtype, blocks):
    """The 16-bit gradient is the fp32 one rounded once; it goes to its own rows and the logits stay."""
    logits = buffer(torch.randn(7, 131))
    columns, target = annotations(7), torch.arange(7)
    arguments = sk.Tokens(target, **columns), torch.ones(7), MIXED, Head()
    wide = cases.in_one_pass(TRITON, buffer(logits), *arguments)[2]
    kept = logits.clone()
    narrow = cases.in_one_pass(TRITON, logits, *arguments, dtype=dtype)[2]
    assert torch.equal(logits, kept)
    rounded = wide.to(dtype)
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter truncates to bf16
        rounded = (wide.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    assert torch.equal(narrow, rounded)


def test_padding_of_a_row_is_never_read_as_logits():
    logits = torch.full((3, aligned_size(131)), torch.nan)[:, :131].copy_(torch.randn(3, 131))
    stats, _ = TRITON.statistics(logits, torch.tensor([0, 5, 130]), Head())
    expected, _ = TORCH.statistics(logits.clone(), torch.tensor([0, 5, 130]), Head())
    for own, other in zip(stats.fields(), expected.fields()):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("vocab", [16, 64, 65, 79, 80])
def test_rows_that_end_with_a_block_or_within_one(vocab):
    """Whole blocks of 16 are not masked, the last one is: targets and banned tokens in the first and last column."""
    values = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))
    values[2, 0] = values[2, -1] = values[3, 1:] = -torch.inf
    target = torch.tensor([0, vocab - 1, vocab // 2, 0])
    tokens, weight = sk.Tokens(target, **annotations(4, seed=1)), torch.ones(4)
    with tuning.forced(tuning.Launch(16, 1)):
        got = cases.in_one_pass(TRITON, buffer(values), tokens, weight, MIXED, Head())
    want = cases.in_one_pass(TORCH, buffer(values), tokens, weight, MIXED, Head())
    for own, other in zip((*got[0].fields(), *got[1:]), (*want[0].fields(), *want[1:])):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=1e-6)


def test_rows_past_two_to_the_31():
    """Row addresses are 64-bit: the last row starts 2³¹ numbers after the first (memory is only touched at rows)."""
    n, vocab, stride = 5, 40, 2**29
    room = torch.UntypedStorage(4 * (stride * 4 + 64))
    logits = torch.empty(0).set_(room, 0, (n, vocab), (stride, 1))
    values = torch.randn(n, vocab)
    logits.copy_(values)
    target, tokens = torch.arange(n), sk.Tokens(torch.arange(n), **annotations(n))
    got = cases.in_one_pass(TRITON, logits, tokens, torch.ones(n), MIXED, Head())
    want = cases.in_one_pass(TORCH, buffer(values), tokens, torch.ones(n), MIXED, Head())
    torch.testing.assert_close(got[2], want[2], rtol=2e-5, atol=1e-6)
    logits.copy_(values)
    stats, normalizer = TRITON.statistics(logits, target, Head())
    torch.testing.assert_close(stats.entropy, want[0].entropy)
    coefs = (torch.ones(n), None, None)
    got = cases.in_second_pass(TRITON, logits, target, normalizer, coefs, Head())
    want = cases.in_second_pass(TORCH, buffer(values), target, normalizer, coefs, Head())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_target_outside_the_vocabulary_is_nan_and_stays_in_its_row():
    logits = buffer(torch.randn(3, 40))
    tokens = sk.Tokens(torch.tensor([1, 40, -7]))
    run = cases.in_one_pass(TRITON, logits, tokens, torch.ones(3), sk.sft(), Head())
    stats, loss, gradient = run
    assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == [False, True, True]
    assert loss.isnan().tolist() == [False, True, True]
    assert stats.logprobs.isnan().tolist() == [False, True, True]
    assert stats.entropy.isfinite().all()


def test_a_row_without_weight_has_no_gradient_whatever_its_derivatives():
    logits, tokens = torch.randn(2, 40), sk.Tokens(torch.tensor([1, 2]), advantages=torch.tensor([torch.inf, 1.0]))
    run = cases.in_one_pass(TRITON, buffer(logits), tokens, torch.tensor([0.0, 1.0]), sk.reinforce(), Head())
    assert (run[2][0] == 0).all() and run[2][1].isfinite().all()


def test_a_soft_cap_far_away_keeps_small_logits():
    """cap · tanh(a / cap) for a ≪ cap is a: no difference of two numbers near 1."""
    a = torch.randn(2, 40)
    for cap in (2.0**10, 2.0**16):
        stats, _ = TRITON.statistics(buffer(a / 16), torch.arange(2), Head(softcap=cap, temperature=2.0**-4))
        expected = (16 * cap * torch.tanh(a.double() / 16 / cap)).log_softmax(-1)[torch.arange(2), torch.arange(2)]
        torch.testing.assert_close(stats.logprobs.double(), expected, rtol=1e-6, atol=0)


def scored(x: torch.Tensor) -> torch.Tensor:
    """Under a soft cap of 1."""
    z = x.clone()
    triton_rows._score_(Head(softcap=1.0), z)
    return z


def test_tanh():
    """Within 2 ulp everywhere, and the numbers at the ends."""
    x = torch.cat([torch.linspace(-9, 9, 30_001), torch.logspace(-30, 0, 999)])[:, None]
    found = scored(x)
    right = torch.tanh(x.double())
    ulp = torch.nextafter(right.float().abs(), torch.tensor(torch.inf)) - right.float().abs()
    assert ((found.double() - right).abs() <= 2 * ulp.double()).all()
    ends = torch.tensor([[-torch.inf], [torch.inf], [torch.nan], [0.0]])
    torch.testing.assert_close(scored(ends), ends.tanh(), equal_nan=True)


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2, 5000)])
@pytest.mark.parametrize("alive", ["some", "all", "none"])
@pytest.mark.parametrize("count", [0, 1, 7, 2048, 5000])
def test_tokens_are_prepared_in_one_launch(count, alive, weights):
    """As PyTorch does it, for counts within a step of the loop, at its end and past it."""
    live = {"some": torch.arange(count) % 3 > 0, "all": torch.arange(count) >= 0}.get(alive, torch.arange(count) < 0)
    target = torch.where(live, torch.arange(count) * 2**33, -100)
    weight = None if weights is None else weights[:count]
    safe, found, zero = triton_rows.prepare(live, target, weight)
    expected = live.float() / live.sum().clamp(min=1) if weight is None else torch.where(live, weight, 0)
    assert torch.equal(safe, torch.where(live, target, 0)) and torch.equal(found, expected)
    assert zero.shape == () and zero == 0


def prepared_by(triton: bool, *arguments, **options):
    """As `select`, but for who prepares tokens."""
    return batch.select(*arguments, **options | {"by_triton": triton})


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name, objective", [("sft", sk.sft()), ("callable", CALLABLE), ("srft", sk.srft_official())])
def test_prepared_tokens_give_what_pytorch_gives(monkeypatch, name, objective, passes):
    """Ignored tokens whose hidden states and annotations are NaN, with and without token weights."""
    n, vocab = 13, 131
    x, w, y = torch.randn(n, 16), torch.randn(vocab, 16), torch.randint(vocab, (n,))
    y[::4] = -100
    x[::4] = torch.nan
    columns = annotations(n)
    columns["advantages"][::4] = torch.nan
    read = {"sft": (), "callable": ("advantages",)}.get(name, ("advantages", "is_demo"))
    columns = {name: columns[name] for name in read}
    results = []
    for token_weight in (None, torch.rand(n)):
        for prepared in (False, True):
            monkeypatch.setattr("srft_kernels.call.select", partial(prepared_by, prepared))
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            plan = sk.Plan(backend="triton", chunk_rows=5, passes=passes, compact=False)
            out = sk.linear_loss(*leaves, y, objective, plan=plan, token_weight=token_weight, **columns)
            told = (out.loss.detach(), out.logprobs, out.entropy, out.logsumexp)
            results.append((*told, *torch.autograd.grad(out.loss, leaves)))
    for plain, prepared in (results[:2], results[2:]):
        for own, other in zip(plain, prepared):
            assert torch.equal(own, other) and other.isfinite().all()
        assert all((value[::4] == 0).all() for value in prepared[1:4])


@pytest.mark.parametrize("multiprocessors", [1, 2, 500])
def test_scale_in_place(monkeypatch, multiprocessors):
    """By fewer programs than blocks, which then walk, and by enough."""
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(triton_rows, "PROGRAMS", 1)
    x = torch.randn(10_001)
    assert torch.equal(triton_rows.scale_(x.clone(), torch.tensor(1.0)), x)
    assert torch.equal(triton_rows.scale_(x.clone(), torch.tensor(0.3)), x * torch.tensor(0.3))


def test_aligned_vectors_can_be_read_as_zeros_past_their_end():
    vector = aligned(torch.ones(5), torch.float32)
    assert vector.as_strided((16,), (1,)).tolist() == [1.0] * 5 + [0.0] * 11


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("passes", [1, 2])
def test_columns_may_be_any_view(backend, passes):
    """target, token_weight and annotations that are strided or expanded give what their copies give."""
    n, vocab = 6, 40
    x, w = torch.randn(n, 8), torch.randn(vocab, 8)
    columns = {
        "target": torch.randint(vocab, (n, 2))[:, 1],
        "token_weight": torch.rand(n, 3)[:, 0],
        "advantages": torch.tensor([0.7]).expand(n),
        "is_demo": (torch.arange(2 * n) % 3 == 0)[::2],
        "old_logprobs": torch.randn(2, n).t()[:, 0],
    }
    results = []
    for copy in (False, True):
        given = {name: column.contiguous().clone() if copy else column for name, column in columns.items()}
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        plan = sk.Plan(backend=backend, chunk_rows=4, passes=passes)
        out = sk.linear_loss(*leaves, given.pop("target"), sk.srft_official(), plan=plan, **given)
        results.append((out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, leaves)))
    for view, copied in zip(*results):
        assert torch.equal(view, copied)


@pytest.mark.parametrize("passes", [1, 2])
def test_whole_numbers_for_cap_and_temperature(passes):
    """softcap=30 is softcap=30.0, though a kernel would be compiled for an integer."""
    x, w, y = torch.randn(5, 8), torch.randn(40, 8), torch.randint(40, (5,))
    plan = sk.Plan(backend="triton", passes=passes)
    whole, real = (
        sk.linear_loss(x.requires_grad_(), w, y, sk.sft(), softcap=cap, temperature=t, plan=plan).loss
        for cap, t in ((30, 2), (30.0, 2.0))
    )
    assert torch.equal(whole, real)


def test_triton_where_it_cannot_run(monkeypatch):
    x, w, y = torch.randn(2, 8), torch.randn(40, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r"backend='triton'.* fp32, but input is fp64: use backend='torch'"):
        sk.linear_loss(x.double(), w.double(), y, sk.sft(), plan=sk.Plan(backend="triton"))
    if not x.is_cuda:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="input is on cpu: move it to a GPU, use backend='torch'"):
            sk.linear_loss(x, w, y, sk.sft(), plan=sk.Plan(backend="triton"))
