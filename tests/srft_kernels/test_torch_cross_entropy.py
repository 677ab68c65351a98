"""Every combination of arguments of PyTorch's cross-entropy, and of options it has not: values and gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional as F

import srft_kernels as sk

from .cases import IGNORED

F64 = torch.float64
N, H, V = 9, 4, 11
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


def tensors(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((N, H), (V, H), (V,))
    )
    y = torch.randint(V, (N,), generator=generator)
    return x, w, b, torch.where(torch.arange(N) % 3 == 1, IGNORED, y), torch.rand(V, generator=generator, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("plan", [None, sk.Plan(chunk_rows=2), sk.Plan(chunk_rows=4, passes=2, compact=False)], ids=str)
def test_arguments_of_pytorch(plan, reduction):
    x, w, b, y, classes = tensors()
    upstream = torch.randn(N, dtype=F64) if reduction == "none" else torch.tensor(-1.7, dtype=F64)
    for bias, weight, smoothing, ignored in product((None, b), (None, classes), (0.0, 0.3, 1.0), (IGNORED, 3, None)):
        target = y.where(y != IGNORED, 3) if ignored == 3 else y
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        leaves = [x, w] if bias is None else [x, w, b]
        own = sk.linear_cross_entropy(x, w, target, linear_bias=bias, ignore_index=ignored, plan=plan, **options)
        found = torch.autograd.grad(own, leaves, upstream)
        references = [F.cross_entropy(F.linear(x, w, bias), target, ignore_index=ignored or IGNORED, **options)]
        if hasattr(F, "linear_cross_entropy"):
            references.append(F.linear_cross_entropy(x, w, target, linear_bias=bias, ignore_index=ignored, **options))
        for reference in references:
            torch.testing.assert_close(own, reference)
            torch.testing.assert_close(found, torch.autograd.grad(reference, leaves, upstream))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("passes, compact", [(1, True), (2, False)])
def test_with_options_beside(passes, compact, reduction, backend):
    """Bias, class weights, smoothing, z-loss, scale, cap and temperatures, all and all but one."""
    dtype = F64 if backend == "torch" else torch.float32
    x, w, b, y, classes = tensors(dtype)
    temperatures = torch.linspace(0.5, 2, N, dtype=dtype)
    full = {"linear_bias": b, "weight": classes, "label_smoothing": 0.2, "z_loss": 0.03, "logit_scale": 0.7,
            "softcap": 1.5, "temperature": temperatures}  # fmt: skip
    live, plan = y != IGNORED, sk.Plan(backend=backend, chunk_rows=4, block_rows=2, passes=passes, compact=compact)
    upstream = torch.randn(N, dtype=dtype) if reduction == "none" else torch.tensor(0.6, dtype=dtype)
    for left_out in (None, *full) if backend == "torch" else (None, "linear_bias", "temperature"):
        options = {name: value for name, value in full.items() if name != left_out}
        own = sk.linear_cross_entropy(x, w, y, reduction=reduction, plan=plan, **options)
        z_loss, weight = options.pop("z_loss", 0), options.pop("weight", None)
        smoothing = options.pop("label_smoothing", 0)
        z = sk.reference.logits(x, w, **options)
        reference = F.cross_entropy(z, y, weight=weight, label_smoothing=smoothing, reduction=reduction)
        square = z_loss * z.logsumexp(-1).square() * live
        total = live.sum() if weight is None else weight[y.clamp(min=0)][live].sum()
        reference = reference + (
            square if reduction == "none" else square.sum() / (total if reduction == "mean" else 1)
        )
        leaves = [x, w] if left_out == "linear_bias" else [x, w, b]
        close = {} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(own, reference, **close, msg=f"without {left_out}")
        torch.testing.assert_close(
            torch.autograd.grad(own, leaves, upstream), torch.autograd.grad(reference, leaves, upstream), **close
        )


def test_class_probabilities_are_refused():
    x, w, *_ = tensors()
    with pytest.raises(
        TypeError, match="target holds class probabilities, which are not supported: pass class indices"
    ):
        sk.linear_cross_entropy(x, w, torch.rand(N, V, dtype=F64))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes(shape, reduction):
    """PyTorch wants the classes in the second dimension; here hidden states are (..., H) and targets (...)."""
    x, w, y = torch.randn(*shape, H, dtype=F64), torch.randn(V, H, dtype=F64), torch.randint(V, shape)
    own = sk.linear_cross_entropy(x, w, y, reduction=reduction)
    reference = F.cross_entropy(F.linear(x, w).reshape(-1, V), y.reshape(-1), reduction=reduction)
    torch.testing.assert_close(own, reference.reshape(shape) if reduction == "none" else reference)
