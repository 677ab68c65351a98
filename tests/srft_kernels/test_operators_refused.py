"""What a compiled call refuses, by name: transforms, tangents and second derivatives would be lost without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

import srft_kernels as sk

from .compiling import compiled, fresh  # noqa: F401

H, V, N = 8, 40, 6
TRANSFORM = "is under a transform of torch.func, which is not supported: use torch.autograd.grad"
TWICE = "srft_kernels is differentiable once"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, target)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, H, generator=g), torch.randn(V, H, generator=g), torch.randint(V, (N,), generator=g)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f),
    "vmap": lambda f: torch.func.vmap(lambda row: f(row[None].expand(N, H))),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_transforms(transform, fullgraph):
    x, w, target = inputs()
    graph = compiled(transform(lambda x: sk.linear_cross_entropy(x, w, target)), fullgraph=fullgraph)
    with pytest.raises(Exception, match=f"input {TRANSFORM}"):
        graph(x)


BESIDE = {
    "temperature": lambda x, w, target, t: sk.linear_cross_entropy(x, w, target, temperature=t),
    "token_weight": lambda x, w, target, t: sk.linear_loss(x, w, target, sk.sft(), token_weight=t).loss,
    "advantages": lambda x, w, target, t: sk.linear_loss(x, w, target, sk.grpo(), advantages=t).loss,
    "candidates": lambda x, w, target, t: (
        sk.linear_logprobs(x, w, target, extras=sk.Extras(candidates=t.long()[:, None])).logprobs
    ),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_transforms_of_what_is_no_leaf(name, wrap):
    x, w, target = inputs()
    with pytest.raises(Exception, match=f"{name} {TRANSFORM}" if wrap is not compiled else TRANSFORM):
        wrap(torch.func.vmap(lambda t: BESIDE[name](x, w, target, t)))(torch.ones(3, N))


CALLS = {
    "one pass": lambda x, w, target: sk.linear_cross_entropy(x, w, target),
    "two passes": lambda x, w, target: sk.linear_logprobs(x, w, target).logprobs.square().sum(),
    "distillation": lambda x, w, target: sk.linear_distillation(x, w, x.detach() + 1, w.detach()).loss,
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_tangents(call: Callable):
    """Also where the graph was made outside of forward mode, which is no error itself."""
    x, w, target = inputs()
    graph = compiled(lambda x: call(x, w, target))
    expected = graph(x)
    with forward_ad.dual_level():
        assert graph(x) == expected
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            graph(forward_ad.make_dual(x, x))


@each_call
def test_second_derivatives(call: Callable):
    """AOT autograd refuses them itself, and so for all the graphs that it makes."""
    x, w, target = inputs()
    x.requires_grad_()
    loss = compiled(lambda x: call(x, w, target), backend="eager")(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match=TWICE):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_dtensors(name, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    x, w, target = inputs()
    mesh = init_device_mesh("cpu", (1,))
    tensors = {"input": x, "linear_weight": w}
    tensors[name] = DTensor.from_local(tensors[name], mesh, [Shard(0)])
    with pytest.raises(Exception, match=rf"{name} is a DTensor, divided over ranks: with FSDP2, call"):
        compiled(lambda t: sk.linear_cross_entropy(**t, target=target))(tensors)


@pytest.mark.parametrize("name", ["softcap", "temperature", "logit_scale"])
def test_numbers_of_numpy(name):
    """Dynamo has them as arrays."""
    x, w, target = inputs()
    number = np.float64(30)
    with pytest.raises(Exception, match=f"{name} must be a constant of Python in a compiled call, found"):
        compiled(lambda: sk.linear_cross_entropy(x, w, target, **{name: number}))()


def test_slips_are_told_as_in_eager_calls():
    """A misspelt option would be an annotation that nobody reads."""

    def objective(stats, tokens):
        return -stats.logprobs * tokens.advantages

    objective.requires = lambda names: ("advantages",)
    x, w, ones = torch.randn(4, 8), torch.randn(20, 8), torch.ones(4)
    call = lambda: sk.linear_loss(x, w, torch.arange(4), objective, advantages=ones, token_weigth=ones).loss  # noqa: E731
    for function in (call, torch.compile(call, backend="eager")):
        with pytest.raises(Exception, match="unknown annotation token_weigth: did you mean token_weight"):
            function()


@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
def test_what_is_no_tensor_is_told_first(name):
    tensors = {"input": torch.randn(4, 8), "linear_weight": torch.randn(20, 8), "target": torch.arange(4)}
    with pytest.raises(Exception, match=f"{name} must be a tensor, found str"):
        torch.compile(lambda: sk.linear_cross_entropy(**{**tensors, name: "a"}), backend="eager")()
