"""Nothing depends on PyTorch's default type or default device: bitwise the same results under each."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor

import srft_kernels as sk

from .cases import BACKENDS
from .compiling import compiled
from .test_house import SOURCES

N, H, V = 24, 8, 33
G = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=G) for shape in ((N, H), (V, H), (V,)))
Y = torch.where(torch.rand(N, generator=G) < 0.2, -100, torch.randint(V, (N,), generator=G))
ONES = torch.ones(N, dtype=torch.float32)
COLUMNS = {
    **{name: -torch.rand(N, generator=G) - 1 for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")},
    "advantages": torch.randint(-1, 3, (N,), generator=G).to(torch.int8),
    "rewards": torch.randint(3, (N,), generator=G).to(torch.uint8),
    "is_demo": torch.rand(N, generator=G) < 0.4,
    "sequence_ids": torch.arange(N) // 5,
    "demo_logprobs": -torch.rand(N, generator=G),
}
OBJECTIVES = {name: getattr(sk, name)() for name in vars(sk.presets)
              if callable(getattr(sk, name, None)) and name.islower()}  # fmt: skip
OBJECTIVES |= {
    "all terms": sk.srft_official(kl_coef=0.1, correction=sk.Correction("mask", "geometric"), max_probability=0.7,
                                  dual_clip=3.0, clip_low=0.2, clip_high=0.3, demo_min=0.1, demo_max=0.6),
    "batch": sk.SRFT(level="batch"),
    "smoothed": sk.sft(label_smoothing=0.1, z_loss=1e-3),
    "silent": sk.srft_paper(negative_coef=0.0),
}  # fmt: skip


def loss(objective, in_a_graph: bool = False, **options):
    given = {name: COLUMNS[name] for name in COLUMNS if name in objective.reads}

    def call(x, w):
        out = sk.linear_loss(x, w, Y, objective, linear_bias=B, **given, **options)
        return [out.loss, out.logprobs, *out.metrics.values()]

    torch._dynamo.reset()
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    results = (compiled(call) if in_a_graph else call)(x, w)
    return [*results, *torch.autograd.grad(results[0], (x, w))]


def builders() -> list[Tensor]:
    mask, ids = Y != -100, COLUMNS["sequence_ids"]
    logprobs, sampler = COLUMNS["old_logprobs"], COLUMNS["sampler_logprobs"]
    switch = sk.hpt_switch(COLUMNS["is_demo"], COLUMNS["rewards"], ids // 2, ids, 0.4, mask)
    corrections = [sk.Correction(outside, level)(logprobs.half(), sampler.half(), ids, mask.long())
                   for outside in ("truncate", "mask", "reject")
                   for level in ("token", "sequence", "geometric")]  # fmt: skip
    averages = sk.token_mean(mask), sk.sequence_mean(mask, ids, sequences=9), sk.constant_length(mask, ids, 7.5)
    return [switch, *averages, *corrections]


def others() -> list[Tensor]:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    ce = [sk.linear_cross_entropy(x, w, Y, weight=weight, reduction=reduction, label_smoothing=0.1)
          for weight in (None, B.abs()) for reduction in ("mean", "sum", "none")]  # fmt: skip
    extras = sk.linear_logprobs(x, w, Y, extras=sk.Extras(True, True, 3, Y.clamp(min=0)[:, None])).extras
    kl = [sk.linear_distillation(x, w, X[:, :4], W[:, :4], divergence=kind, mask=Y > 0).loss
          for kind in ("forward_kl", "reverse_kl", "jensen_shannon")]  # fmt: skip
    gradients = [torch.autograd.grad(value.sum(), w, retain_graph=True)[0] for value in (*ce, *kl)]
    filtered = loss(sk.sft(), plan=sk.Plan(filter=sk.Filter(0.3, 1.0), chunk_rows=7))
    half = sk.linear_logprobs(X.half(), W.half(), Y, temperature=ONES / 2).entropy
    told = [value for value in vars(extras).values() if value is not None]
    return [*ce, *kl, *gradients, *filtered, half, *told]


CALLS = {
    **{f"{name}, {backend}": (lambda o=o, b=b: loss(o, plan=sk.Plan(backend=b, chunk_rows=10)))
       for name, o in OBJECTIVES.items() for backend, b in (("PyTorch", "torch"), ("Triton", "triton"))
       if b in [getattr(case, "values", [case])[0] for case in BACKENDS]},
    **{f"{name}, two passes": (lambda o=o: loss(o, plan=sk.Plan(passes=2))) for name, o in OBJECTIVES.items()},
    **{f"{name}, in a graph": (lambda o=OBJECTIVES[name]: loss(o, True)) for name in ("grpo", "all terms", "batch")},
    "builders": builders,
    "others": others,
}  # fmt: skip
ONCE: dict[str, list[Tensor]] = {}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("default", ["bfloat16", "float16", "float64", "meta"])
def test_results_are_the_same_under(default, call):
    expected = ONCE.setdefault(call, CALLS[call]())
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        found = CALLS[call]()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype and own.device == other.device
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


FACTORIES = ("zeros", "ones", "full", "empty", "tensor", "as_tensor", "scalar_tensor", "arange", "linspace", "rand",
             "randn", "randint", "randperm", "eye")  # fmt: skip


def test_every_factory_is_told_its_type_and_its_device():
    for file, source in SOURCES.items():
        if file.startswith("rows/triton"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"torch.{name}" for name in FACTORIES]:
                told = {keyword.arg for keyword in node.keywords}
                assert "device" in told, f"{file}:{node.lineno}"
                assert told & {"dtype"} or ast.unparse(node.func) == "torch.arange", f"{file}:{node.lineno}"
