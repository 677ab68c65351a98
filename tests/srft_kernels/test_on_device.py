"""The loss head where it will run: on CUDA when there is a device, else on the CPU with Triton's interpreter.

The other tests here make their tensors on the CPU; these move the same problems to the device.
"""

from dataclasses import replace

import pytest
import torch

import srft_kernels as sk

from . import cases
from . import test_distillation as distillation

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ON_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
NARROW = ["random", "peaked", "bias", "softcap", "padded", "everything"]
CALLABLE = lambda stats, tokens: -tokens.advantages * stats.logprobs - 0.1 * stats.entropy  # noqa: E731
BUILT_IN = sk.PolicyGradient(surrogate="reinforce", entropy_coef=0.1)


@pytest.fixture(autouse=True)
def fp32_products():
    """The rule compares with fp64: products may not be rounded to tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def problem(kind: str, dtype: torch.dtype = torch.float32, **size: int) -> cases.Problem:
    return moved(cases.problem(kind, dtype=dtype, **size))


def moved(made: cases.Problem) -> cases.Problem:
    bias = None if made.bias is None else made.bias.to(DEVICE)
    return replace(
        made, input=made.input.to(DEVICE), weight=made.weight.to(DEVICE), target=made.target.to(DEVICE), bias=bias
    )


def columns(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "advantages": torch.randn(n, generator=generator),
        "rewards": torch.randint(2, (n,), generator=generator).float(),
        "is_demo": torch.rand(n, generator=generator) < 0.4,
        "old_logprobs": -4.9 + torch.randn(n, generator=generator) / 4,
        "ref_logprobs": -4.9 + torch.randn(n, generator=generator) / 4,
        "sequence_ids": torch.arange(n) // 4,
    }
    return {name: column.to(DEVICE) for name, column in made.items()}


def check(kind: str, dtype: torch.dtype, passes: int | None, backend: str, **size: int) -> None:
    given = problem(kind, dtype, **size)
    advantages = {"advantages": columns(len(given.target))["advantages"]}
    truth, eager = (f(given, CALLABLE, **advantages) for f in (cases.truth, cases.eager))
    plan = sk.Plan(backend=backend, chunk_rows=5, passes=passes)
    for objective in (BUILT_IN, CALLABLE):
        cases.assert_exact(cases.ours(given, objective, plan, **advantages), eager, truth, note=objective)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", cases.KINDS if CUDA else ["random", "everything"])
def test_exact(kind, passes):
    check(kind, torch.float32, passes, "triton")


@ON_CUDA
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NARROW)
def test_exact_in_16_bits(kind, dtype, passes):
    check(kind, dtype, passes, "triton")


@ON_CUDA
@pytest.mark.parametrize("kind", ["random", "everything"])
def test_torch_rows_on_a_gpu(kind):
    check(kind, torch.float32, None, "torch")


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_many_blocks(dtype):
    """Real row lengths: several loop steps of the kernel, rows that end inside a block."""
    check("random", dtype, 1, "triton", tokens=40, hidden=64, vocab=151_937)


@pytest.mark.parametrize("preset", ["sft", "dft", "grpo", "cispo", "srft_paper", "srft_official", "luffy", "srft_hpt"])
def test_presets_agree_with_the_torch_rows(preset):
    given, annotations = problem("random", tokens=12), columns(12)
    results = []
    for backend in ("torch", "triton"):
        leaves = given.leaves()
        plan = sk.Plan(backend=backend, chunk_rows=5)
        out = sk.linear_loss(*leaves, given.target, getattr(sk, preset)(), plan=plan, **annotations)
        results.append((out.loss.detach(), out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves)))
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", distillation.DIVERGENCES)
def test_distillation(divergence, dtype):
    made = distillation.pair("everything", dtype=dtype)
    student, teacher = moved(made.student), moved(made.teacher)
    on_device = distillation.Pair(student, teacher, made.mask.to(DEVICE), made.weight.to(DEVICE))
    distillation.check(on_device, divergence, "triton", chunks=(5,))


def results(given: cases.Problem, plan: sk.Plan, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """ℓ, H and the gradients of some tokens (all of them) in this order; weights that depend on no other token."""
    n = len(given.target)
    tokens = torch.arange(n, device=DEVICE) if tokens is None else tokens
    x, w = given.input[tokens].requires_grad_(), given.weight.clone().requires_grad_()
    advantages, weight = columns(n)["advantages"][tokens], torch.ones(len(tokens), device=DEVICE)
    out = sk.linear_loss(
        x, w, given.target[tokens], BUILT_IN, plan=plan, advantages=advantages, token_weight=weight, **given.head
    )
    dx, dw = torch.autograd.grad(out.loss, (x, w))
    return {"logprobs": out.logprobs, "entropy": out.entropy, "dx": dx, "dW": dw}


SIZE = {"tokens": 300, "hidden": 512, "vocab": 20_011} if CUDA else {"tokens": 19, "hidden": 64, "vocab": 131}
ROWS = 128 if CUDA else 8
BITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", BITS)
def test_a_batch_invariant_tokens_results_are_bitwise_the_same_in_any_company(dtype, passes):
    given = problem("gaussian", dtype, **SIZE)
    plan = sk.Plan(backend="triton", chunk_rows=ROWS, passes=passes, batch_invariant=True)
    whole = results(given, plan)
    order = torch.randperm(SIZE["tokens"], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for count in (1, ROWS + 1, len(order)):
        found = results(given, plan, order[:count])
        for name in ("logprobs", "entropy", "dx"):
            assert torch.equal(found[name], whole[name][order[:count]]), (name, count)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", BITS)
def test_two_runs_are_bitwise_the_same(dtype, passes, backend):
    """In the second one, memory that is not written before it is read would be NaN."""
    given = problem("gaussian", dtype, **SIZE)
    plan = sk.Plan(backend=backend, chunk_rows=ROWS, passes=passes)
    first = results(given, plan)
    torch.full((SIZE["vocab"], 4 * SIZE["hidden"]), torch.nan, device=DEVICE)
    second = results(given, plan)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", BITS if CUDA else [torch.float32])  # the interpreter has no bf16 products
def test_a_filter_whose_bound_always_fails_is_the_dense_backward(dtype, monkeypatch):
    from srft_kernels.rows import triton_residual

    def counted(*arguments):
        ran.append(arguments)
        return add_product_(*arguments)

    ran, add_product_ = [], triton_residual.add_product_
    monkeypatch.setattr(triton_residual, "add_product_", counted)
    monkeypatch.setattr("srft_kernels.filter.runs_triton", lambda *_: True)  # without a device too
    given = problem("gaussian", dtype, **SIZE)
    plan = sk.Plan(backend="triton", chunk_rows=ROWS, filter=sk.Filter(1 / 100, 1e-9))
    found, dense = results(given, plan), results(given, replace(plan, filter=None))
    chunks = len(list(plan.chunks(SIZE["tokens"] if CUDA else int(given.live.sum()))))
    assert len(ran) == 2 * chunks
    for name, value in found.items():
        difference = (value.double() - dense[name].double()).norm() / dense[name].double().norm()
        assert difference < BITS[dtype], name


@ON_CUDA
def test_the_default_plan_takes_triton():
    assert sk.Plan.choose(100, 64, 1000, torch.bfloat16, "cuda").backend == "triton"


@ON_CUDA
def test_an_upstream_gradient_scales():
    given = problem("random", torch.bfloat16, tokens=64)
    grads = []
    for factor in (1.0, 3.0):
        leaves = given.leaves()
        loss = sk.linear_cross_entropy(*leaves, given.target)
        grads.append(torch.autograd.grad(loss * factor, leaves))
    for once, thrice in zip(*grads):
        torch.testing.assert_close(thrice, 3 * once, rtol=2e-2, atol=1e-6)


@ON_CUDA
def test_a_target_out_of_range_is_nan_there_alone():
    given = problem("random", tokens=8, ignored=0)
    target = given.target.clone()
    target[3] = 131
    stats = sk.linear_logprobs(given.input, given.weight, target)
    assert stats.logprobs[3].isnan() and stats.logprobs[target != 131].isfinite().all()


@ON_CUDA
def test_no_live_token():
    given = problem("random", torch.bfloat16)
    leaves = given.leaves()
    loss = sk.linear_cross_entropy(*leaves, torch.full_like(given.target, -100))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


@ON_CUDA
def test_offsets_past_2_to_the_31():
    """Rows of one chunk whose logits lie past 2³¹ numbers; the last rows are as right as the first."""
    rows, vocab = 18_000, 131_072
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    x = torch.randn(rows, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, 16, device=DEVICE, dtype=torch.bfloat16)
    target = torch.randint(vocab, (rows,), device=DEVICE)
    found = sk.linear_logprobs(x, weight, target, plan=sk.Plan(backend="triton", chunk_rows=rows)).logprobs
    expected = (x[-8:].double() @ weight.double().t()).log_softmax(-1).gather(1, target[-8:, None])[:, 0]
    torch.testing.assert_close(found[-8:].double(), expected, rtol=1e-4, atol=1e-3)
