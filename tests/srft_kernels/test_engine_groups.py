"""∂L/∂a of many tokens beside the logits of few: exact, whatever waits for one product, and within the memory said."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import srft_kernels as sk
from bench.host import Launches, Products
from srft_kernels import engine, rows
from srft_kernels.call import Arguments
from srft_kernels.objectives.objective import TokenStats
from srft_kernels.plan import Plan

from .cases import BACKENDS, FP16_KINDS, IGNORED, KINDS, assert_exact, eager, ours, problem, truth
from .mixed import Held, aten, mixed_products
from .test_exactness import columns_of, everything

GIB = 2**30
SIZES = [(5, None), (5, 7), (3, 64)]  # one product per chunk, several chunks in each, one for all tokens


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "kind, dtype", [*((k, torch.bfloat16) for k in KINDS), *((k, torch.float16) for k in FP16_KINDS)]
)
def test_exact(backend, kind, passes, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    p = problem(kind, dtype=dtype)
    columns = columns_of(p)
    reference = truth(p, everything, **columns)
    for chunk_rows, gradient_rows in SIZES[1:] if backend == "triton" else SIZES:
        plan = Plan(backend=backend, chunk_rows=chunk_rows, gradient_rows=gradient_rows, block_rows=2, passes=passes)
        usual = eager(p, everything, plan, **columns)
        with mixed_products():
            found = ours(p, everything, plan, **columns)
        assert_exact(found, usual, reference, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [1, 2])
def test_chunks_within_one_group_do_not_matter(passes, dtype):
    """Bit for bit: dx and dW are one product each, whatever the logits came in."""
    p = problem("random", tokens=24, dtype=dtype)
    columns, results = columns_of(p), []
    for chunk_rows in (1, 5, 16, 24):
        plan = Plan(chunk_rows=chunk_rows, gradient_rows=24, passes=passes)
        with mixed_products():
            results.append(ours(p, everything, plan, **columns).values)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


def product_shapes(plan: Plan, tokens: int = 24, **options) -> list[str]:
    """The products of one call in bf16, by operator and rows."""
    x, w, y = torch.randn(tokens, 8), torch.randn(40, 8), torch.randint(40, (tokens,))
    y[::6] = IGNORED
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (aten.mm, aten.addmm):
                operands = [t for t in args if isinstance(t, torch.Tensor)][-2:]
                shapes = "×".join(str(tuple(t.shape)) for t in operands)
                summed = function.overloadpacket is aten.addmm and (kwargs or {}).get("beta", 1) == 1
                seen.append(f"{shapes}{' added' * summed}")
            return function(*args, **(kwargs or {}))

    with mixed_products(), Watch():
        leaves = [x.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()]
        sk.linear_loss(*leaves, y, sk.sft(), plan=plan, **options).loss.backward()
    return seen


def test_one_product_each_where_gradients_of_all_tokens_wait():
    plan = Plan(chunk_rows=8, gradient_rows=24, compact=False, passes=1)
    assert product_shapes(plan) == ["(8, 8)×(8, 40)"] * 3 + ["(24, 40)×(40, 8)", "(40, 24)×(24, 8)"]


def test_a_sum_in_fp32_over_groups():
    plan = Plan(chunk_rows=8, gradient_rows=16, compact=False, passes=1)
    logits, dx, dw = "(8, 8)×(8, 40)", "(16, 40)×(40, 8)", "(40, 16)×(16, 8)"
    rest = [logits, "(8, 40)×(40, 8)", "(40, 8)×(8, 8) added"]
    assert product_shapes(plan) == [logits, logits, dx, dw, *rest]


@pytest.mark.parametrize("gradient_rows", [None, 12, 48])
def test_every_plan_gives_the_same(gradient_rows):
    """Two passes, frozen parts, a filter that keeps everything, weight_grad, filled chunks, idle tokens."""
    torch.manual_seed(0)
    x, w, y = torch.randn(48, 8).bfloat16(), torch.randn(60, 8).bfloat16(), torch.randint(60, (48,))
    y[::7] = IGNORED
    advantages = (torch.arange(48) % 3 == 0).float() * 0.5
    usual = None
    variants = [{"passes": 1}, {"passes": 2}, {"compact": True}, {"compact": False}, {"batch_invariant": True},
                {"filter": sk.Filter(columns=1.0)}]  # fmt: skip
    for options in variants:
        if options.get("batch_invariant"):
            plan = Plan(chunk_rows=12, gradient_rows=12, **options)
        else:
            plan = Plan(chunk_rows=6, gradient_rows=gradient_rows, **options)
        for in_place in (False, True):
            if in_place and options.get("passes") == 2:
                continue
            grad = torch.zeros(60, 8) if in_place else None
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with mixed_products():
                out = sk.linear_loss(a, b, y, sk.grpo(), plan=plan, advantages=advantages, weight_grad=grad)
                out.loss.backward()
            found = [out.loss.detach(), a.grad.float(), grad if in_place else b.grad.float()]
            usual = found if usual is None else usual
            for value, expected in zip(found, usual):
                torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("active", [0, 1, 15, 16, 17, 40, 64])
def test_chunks_of_idle_rows_start_where_kernels_are_compiled_for(active):
    """At a multiple of 16, whatever the number of active rows: those of them that it has once more are dropped."""
    pytest.importorskip("triton")
    x, w, y = torch.randn(64, 8), torch.randn(40, 8), torch.randint(40, (64,))
    advantages = (torch.randperm(64) < active).float() * 0.7
    x[advantages == 0] = torch.nan  # which must not reach the head's gradient
    starts, results = [], []
    for backend in ("triton", "torch"):
        ops = type(Plan(backend=backend).row_ops)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        with pytest.MonkeyPatch.context() as patch:

            def seen(self, logits, target, *more, run=ops.statistics):
                starts.append(len(target))
                return run(self, logits, target, *more)

            patch.setattr(ops, "statistics", seen)
            plan = Plan(backend=backend, chunk_rows=64, compact=True)
            weight = (advantages != 0).float()
            out = sk.linear_loss(*leaves, y, sk.reinforce(), plan=plan, advantages=advantages, token_weight=weight)
        told = (out.logprobs, out.entropy, out.logsumexp)
        results.append((out.loss.detach(), *told, *torch.autograd.grad(out.loss, leaves)))
        assert all(value.isfinite().all() for value in results[-1][4:])
    assert starts == ([64 - active // 16 * 16, 64 - active] if active < 64 else [])
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_frozen_parts_and_gradients_in_the_returned_memory():
    """dW's own memory holds ∂L/∂a while its sum is made in fp32: nothing is left of it there."""
    p = problem("random", tokens=30, hidden=64, vocab=80, dtype=torch.bfloat16)
    grads = {}
    for rows_ in (30, 10):  # one product; three, whose 10 rows of 80 numbers fit into dW's 80 × 64
        for frozen in ("", "input", "weight"):
            x = p.input.clone().requires_grad_(frozen != "input")
            w = p.weight.clone().requires_grad_(frozen != "weight")
            with mixed_products():
                sk.linear_loss(x, w, p.target, sk.sft(), plan=Plan(chunk_rows=5, gradient_rows=rows_)).loss.backward()
            grads[rows_, frozen] = x.grad, w.grad
            assert w.grad is None or w.grad.dtype == torch.bfloat16
    for found in grads.values():
        for value, expected in zip(found, grads[30, ""]):
            if value is not None:
                torch.testing.assert_close(value.float(), expected.float(), rtol=1e-2, atol=1e-5)
                assert value.untyped_storage().nbytes() <= 2 * 80 * 64


# ---- memory, counted on a device without data


class NoRows:
    """Row operations that allocate what the Triton ones do, and no more."""

    def loss_and_gradient(self, logits, dlogits, tokens, weight, objective, head, extras=None):
        out = logits.new_empty(4, len(logits))
        return TokenStats(out[1], out[2], out[3]), out[0]

    def statistics(self, logits, target, head, extras=None):
        out = logits.new_empty(7, len(logits))
        return TokenStats(out[0], out[1], out[2], None), rows.Normalizer(out[4], out[5], out[6])

    def gradient(self, logits, dlogits, target, normalizer, coefs, head):
        pass


def peak(monkeypatch, tokens: int, hidden: int, vocab: int, frozen: bool = False, masked: bool = True, **options):
    """(most bytes held beside the inputs and what is returned, the plan)"""
    triton_rows = pytest.importorskip("srft_kernels.rows.triton_rows")
    monkeypatch.setattr(triton_rows, "_prepare_kernel", Launches("prepare", []))
    monkeypatch.setattr(triton_rows, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Plan, "row_ops", property(lambda plan: NoRows()))
    monkeypatch.setattr("srft_kernels.plan.runs_triton", lambda *_: True)
    monkeypatch.setattr("srft_kernels.head.mixes", lambda *_: True)
    dtype = options.pop("dtype", torch.bfloat16)
    plan = Plan.choose(tokens, hidden, vocab, dtype, "cuda", head_gradient=not frozen, **options)
    needs_grad = True, not frozen, False
    with torch.no_grad(), Products(), torch.device("meta"):  # torch's own fake CUDA tensors cannot be sliced without it
        x, w = (torch.empty(rows, hidden, dtype=dtype) for rows in (tokens, vocab))
        target = torch.zeros(tokens, dtype=torch.int64)
        ignored = IGNORED if masked else None
        with Held() as held:
            arguments = Arguments(
                input=x, linear_weight=w, target=target, ignore_index=ignored, plan=plan, objective=sk.sft()
            )
            tensors, call = arguments.prepared()
            _, _, gradients, scale = engine.one_pass(tensors, needs_grad, call)
            kept = gradients.finish(rounded=scale is None)
            del gradients
        returned = sum(gradient.nbytes for gradient in kept if gradient is not None)
        assert returned <= held.now < returned + 100 * tokens + 1000
    return held.most - returned, plan


SHAPES = [(8192, 4096, 151936), (8192, 3584, 152064), (32768, 4096, 151936), (8192, 2048, 151936), (8192, 896, 151936),
          (32768, 896, 151936), (32768, 2048, 151936), (64, 4096, 151936), (12000, 4096, 151936), (5000, 7168, 129280),
          (40000, 7168, 129280), (4096, 1024, 32000), (100_000, 2304, 256000)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_memory_of_the_default_plan(monkeypatch, shape, masked):
    """1 GiB beside dW in fp32 or 16-bit gradients of 8192 tokens, whichever is more; and no more than the plan says."""
    tokens, hidden, vocab = shape
    found, plan = peak(monkeypatch, *shape, masked=masked)
    assert found <= GIB + max(4 * vocab * hidden, 2 * 8192 * vocab)
    assert found <= plan.workspace_bytes + 200 * tokens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [
    {"workspace_bytes": 2**28}, {"workspace_bytes": 2**31}, {"frozen": True}, {"batch_invariant": True},
    {"dtype": torch.float16},
], ids=str)  # fmt: skip
def test_memory_of_other_plans(monkeypatch, shape, options):
    tokens, hidden, vocab = shape
    if options.get("batch_invariant") and tokens % 1024:
        pytest.skip("filled up with rows of their own")
    found, plan = peak(monkeypatch, *shape, **options)
    budget = options.get("workspace_bytes", GIB)
    fp32 = 0 if options.get("frozen") else 4 * vocab * hidden
    beside = fp32 if "workspace_bytes" in options or options.get("frozen") else max(fp32, 2 * 8192 * vocab)
    assert found <= plan.workspace_bytes + 200 * tokens
    assert plan.workspace_bytes <= budget + beside


def test_a_plan_by_hand_is_followed():
    plan = Plan(chunk_rows=4, gradient_rows=12)
    assert "chunks of 4 tokens, gradients of 12" in str(plan)
    assert [r.stop - r.start for r in plan.groups(30)] == [12, 12, 6]
    with pytest.raises(
        ValueError, match=r"gradient_rows=3\): gradients of whole .*, so take gradient_rows >= chunk_rows"
    ):
        replace(plan, gradient_rows=3)
