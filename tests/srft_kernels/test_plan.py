"""Plans: what `choose` promises, what a plan made by hand refuses, and that results do not depend on them."""

from __future__ import annotations

import random

import pytest
import torch

import srft_kernels as sk
from srft_kernels import plan as plans

from .cases import problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "tokens, hidden, vocab", [(0, 8, 5), (1, 1, 1), (7, 16, 1021), (2048, 576, 49152), (10**6, 4096, 151936)]
)
@pytest.mark.parametrize("budget", [None, 1, 10**6, 10**9])
def test_choose(tokens, hidden, vocab, dtype, budget):
    plan = sk.Plan.choose(tokens, hidden, vocab, dtype, "cpu", workspace_bytes=budget)
    assert plan.backend == "torch" and plan.passes is None
    assert 1 <= plan.block_rows <= plan.chunk_rows <= max(tokens, 1)
    numbers = 8 if dtype == torch.float64 else 4
    if budget and plan.chunk_rows > 1:
        assert plan.chunk_rows * vocab * numbers <= budget
    assert plan.workspace_bytes >= plan.chunk_rows * vocab * numbers


@pytest.mark.parametrize(
    "options", [{}, {"head_gradient": False}, {"batch_invariant": True}, {"filter": sk.Filter()}], ids=str
)
@pytest.mark.parametrize("budget", [None, 1, 10**5, 10**8, 10**11])
def test_choose_where_gradients_have_a_buffer_of_their_own(budget, options):
    """Over shapes of any size: within the memory that was allowed, unless one row is more."""
    rng = random.Random(0)
    for _ in range(300):
        size = tokens, hidden, vocab = [int(2 ** rng.uniform(0, most)) for most in (20, 13, 19)]
        dtype = rng.choice([torch.bfloat16, torch.float16])
        plan = sk.Plan.choose(*size, dtype, "cuda", workspace_bytes=budget, **options)
        assert 1 <= plan.chunk_rows <= plan.gradient_rows, (size, plan)
        assert plan.batch_invariant or plan.gradient_rows <= tokens
        assert sum(rows.stop - rows.start for rows in plan.groups(tokens)) == tokens
        total = 4 * vocab * hidden * options.get("head_gradient", True)
        beside = max(total, 2 * 8192 * (vocab + 15) * bool(total)) if budget is None else total
        gathered = plan.filter and (4 * plan.gradient_rows * (vocab + 15) + 8 * vocab * hidden) * plan.filter.columns
        allowed = (2**30 if budget is None else budget) + beside + (gathered or 0)
        assert plan.workspace_bytes <= allowed or plan.chunk_rows == 1, (size, plan)


def test_bar_of_the_default_on_cpu():
    """N = 2048, H = 576, V = 49152 in fp32: at most 80 MB beside the gradients."""
    assert sk.Plan.choose(2048, 576, 49152, torch.float32, "cpu").workspace_bytes <= 80e6


def test_16_bit_heads_count_their_accumulator():
    narrow, wide = (sk.Plan.choose(64, 512, 1000, t, "cpu").workspace_bytes for t in (torch.bfloat16, torch.float32))
    assert narrow - wide == 2 * 512 * 1000 * 4  # the fp32 gradient, and the head widened


@pytest.mark.parametrize(
    "device, backend",
    [("cuda", "triton"), ("cuda:1", "triton"), ("xpu", "triton"), ("cpu", "torch"), ("mps", "torch"), ("hpu", "torch")],
)
def test_triton_rows_where_triton_drives_the_device(monkeypatch, device, backend):
    monkeypatch.setattr(plans, "has_triton", lambda: True)
    chosen = [sk.Plan.choose(8192, 512, 64000, t, device) for t in (torch.float32, torch.bfloat16)]
    assert {plan.backend for plan in chosen} == {backend}
    gibibyte = 2**30 // (64000 * 4)  # of logits: memory that nobody misses on an accelerator
    for plan, narrow in zip(chosen, (False, True)):
        if narrow and device.startswith("cuda"):  # ∂L/∂a of all tokens beside the logits of some
            assert (plan.chunk_rows, plan.gradient_rows) == (1024, 8192)
        else:
            assert plan.gradient_rows is None
            assert plan.chunk_rows < 400 if device == "cpu" else gibibyte - 128 < plan.chunk_rows
    monkeypatch.setattr(plans, "has_triton", lambda: False)
    assert sk.Plan.choose(8192, 512, 32000, torch.float32, device).backend == "torch"


def test_fp64_has_torch_rows_and_none_on_mps(monkeypatch):
    monkeypatch.setattr(plans, "has_triton", lambda: True)
    for device in ("cuda", "xpu", "cpu"):
        assert sk.Plan.choose(64, 8, 100, torch.float64, device).backend == "torch"
    with pytest.raises(TypeError, match="MPS has no fp64: take fp32"):
        sk.Plan.choose(64, 8, 100, torch.float64, "mps")


def test_16_bit_heads_are_widened_where_products_cannot_return_fp32():
    head = 512 * 1000 * 4
    gradients = 64 * (2 * 1008 + 6 * 512)  # in 16 bits; the hidden states once more, and dx in fp32
    # elsewhere than on CUDA the gradient in fp32, and the head itself
    for device, more in (("cuda", gradients), ("xpu", 2 * head), ("mps", 2 * head)):
        narrow, wide = (
            sk.Plan.choose(64, 512, 1000, t, device).workspace_bytes for t in (torch.bfloat16, torch.float32)
        )
        assert narrow - wide == more


def test_triton_rows_are_refused_where_it_cannot_compile(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="input is on meta: move it to a GPU, use backend='torch'"):
        sk.Plan(backend="triton").check(torch.empty(3, device="meta"), torch.float32)


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 9, 100])
@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 1000])
def test_chunks_cover_every_row_once(rows, chunk_rows):
    chunks = list(sk.Plan(chunk_rows=chunk_rows).chunks(rows))
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    sizes = {chunk.stop - chunk.start for chunk in chunks}
    assert all(0 < size <= chunk_rows for size in sizes)
    assert len(chunks) == -(-rows // chunk_rows)


def test_chunks_are_alike_and_of_whole_tiles():
    def sizes(rows, chunk_rows):
        return [chunk.stop - chunk.start for chunk in sk.Plan(chunk_rows=chunk_rows).chunks(rows)]

    assert sizes(8192, 1664) == [1664] * 4 + [1536]
    assert sizes(2048, 1664) == [1024, 1024]
    assert sizes(300, 192) == [160, 140]
    assert sizes(9, 8) == [5, 4]
    # where a chunk starts, a column of bytes is as aligned as the first of them: kernels are compiled for that
    assert all(
        chunk.start % 16 == 0 for chunk in sk.Plan.choose(10_000, 64, 151_936, torch.bfloat16, "cuda").chunks(9_999)
    )


def test_chunks_that_are_filled_up_stay_small_where_rows_are_short():
    assert sk.Plan.choose(64, 8, 32, torch.float32, "cpu", batch_invariant=True).chunk_rows == 2048


@pytest.mark.parametrize("dtype", ["bf16", torch.int64])
def test_a_plan_is_for_a_floating_point_type(dtype):
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype, found"):
        sk.Plan.choose(64, 8, 32, dtype, "cpu")


def test_printed():
    plan = sk.Plan(chunk_rows=64, passes=1, workspace_bytes=12_300_000)
    waiting = sk.Plan(chunk_rows=64, gradient_rows=128, passes=1)
    assert str(waiting) == "torch rows, chunks of 64 tokens, gradients of 128, one pass"
    assert str(plan) == "torch rows, chunks of 64 tokens, one pass, 12.3 MB of workspace"
    assert str(sk.Plan(passes=2)) == "torch rows, chunks of 256 tokens, two passes"
    assert "one pass where the objective allows" in str(sk.Plan.choose(8, 8, 8, torch.float32, "cpu"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "cuda"}, r"Plan\(backend='cuda'\): expected 'torch' or 'triton'"),
        ({"passes": 3}, r"Plan\(passes=3\): expected 1, 2 or None"),
        ({"chunk_rows": 0}, r"Plan\(chunk_rows=0\): expected a positive integer"),
        ({"chunk_rows": 2.5}, r"Plan\(chunk_rows=2.5\): expected a positive integer"),
        ({"gradient_rows": 0}, r"Plan\(gradient_rows=0\): expected a positive integer"),
        (
            {"batch_invariant": True, "chunk_rows": 8, "gradient_rows": 16},
            r"gradient_rows=16\): every product has chunk_rows rows, so leave gradient_rows out",
        ),
        ({"block_rows": -1}, r"Plan\(block_rows=-1\): expected a positive integer"),
    ],
)
def test_impossible_plans(options, message):
    with pytest.raises(ValueError, match=message):
        sk.Plan(**options)


def test_no_result_depends_on_the_plan():
    p = problem("everything", tokens=40, dtype=torch.float64)
    results = []
    for plan in [None, *(sk.Plan(chunk_rows=c, block_rows=b, passes=k) for c, b, k in
                         [(1, 1, 1), (7, 3, 1), (64, 64, 1), (1, 4, 2), (13, 5, 2), (64, 1, 2)])]:  # fmt: skip
        x, w, b = p.leaves()
        out = sk.linear_loss(x, w, p.target, sk.sft(), linear_bias=b, plan=plan, **p.head)
        results.append((out.loss.detach(), out.logprobs, out.entropy, *torch.autograd.grad(out.loss, (x, w, b))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], equal_nan=True)
