"""What cannot be in a graph runs between two: right all the same, and refused with its reason under fullgraph=True."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import srft_kernels as sk

from .compiling import assert_bitwise, compiled, fresh, gradients  # noqa: F401

H, V, N = 8, 40, 12
REASON = "srft_kernels runs outside of a graph what it cannot compile: calls with group=, token_group= or weight_grad="


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, W, target with ignored tokens, advantages)."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((N, H), (V, H)))
    target = torch.randint(V, (N,), generator=g)
    target[::5] = -100
    return x, w, target, torch.randn(N, generator=g)


def check(call, *leaves: Tensor) -> None:
    """call(*leaves) -> (loss, detached tensors): with graphs around it as without, and refused in one."""
    found, expected = compiled(call, fullgraph=False)(*leaves), call(*leaves)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], *leaves), gradients(expected[0], *leaves))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REASON):
        compiled(call)(*leaves)


@pytest.mark.parametrize("name", ["group", "token_group"])
def test_groups(name, alone):
    x, w, target, advantages = inputs()

    def loss(x, w):
        out = sk.linear_loss(2 * x, w, target, sk.grpo(), advantages=advantages, **{name: alone})
        return 3 * out.loss, out.logprobs, out.entropy, out.logsumexp

    def cross_entropy(x, w):
        return (3 * sk.linear_cross_entropy(2 * x, w, target, **{name: alone}),)

    def logprobs(x, w):
        stats = sk.linear_logprobs(2 * x, w, target, group=alone)
        return (stats.logprobs * advantages).sum(), stats.entropy.detach()

    check(loss, x, w)
    check(cross_entropy, x, w)
    if name == "group":
        check(logprobs, x, w)


def test_weight_grad():
    x, w, target, advantages = inputs()

    def call(x, w, master):
        return sk.linear_loss(2 * x, w, target, sk.grpo(), advantages=advantages, weight_grad=master).loss + 1

    masters = [torch.ones(V, H), torch.ones(V, H)]
    losses = [compiled(call, fullgraph=False)(x, w, masters[0]), call(x, w, masters[1])]
    assert_bitwise(gradients(losses[0], x), gradients(losses[1], x))
    assert_bitwise(masters[:1], masters[1:])
    assert (masters[0] != 1).any()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REASON):
        compiled(call)(x, w, masters[0])


class WithMetrics:
    def __call__(self, stats, tokens):
        return -tokens.advantages * stats.logprobs

    def metrics(self, stats, tokens):
        return {"mean": stats.logprobs.mean(), "count": torch.tensor(float(len(stats.logprobs)))}


class OverTheBatch:
    """Reads other tokens, and would read ignored ones if it were shown them."""

    token_local = False

    def __call__(self, stats, tokens):
        return -(tokens.advantages - tokens.advantages.mean()) * stats.logprobs + stats.entropy.mean()


@pytest.mark.parametrize("objective", [WithMetrics(), OverTheBatch()], ids=lambda objective: type(objective).__name__)
def test_objectives_of_ones_own(objective):
    x, w, target, advantages = inputs()

    def call(x, w):
        out = sk.linear_loss(2 * x, w, target, objective, advantages=advantages)
        return 3 * out.loss, out.logprobs, out.entropy, out.logsumexp, *out.metrics.values()

    assert len(call(x, w)) == (6 if isinstance(objective, WithMetrics) else 4)
    check(call, x, w)


class LeavesOutTheDead(OverTheBatch):
    reads_live = True

    def __call__(self, stats, tokens):
        live = tokens.get("live")
        live = torch.ones_like(stats.logprobs, dtype=torch.bool) if live is None else live
        entropy = torch.where(live, stats.entropy, 0).sum() / live.sum()
        return -tokens.advantages * stats.logprobs + entropy


def test_an_objective_that_reads_who_is_live_is_in_the_graph():
    x, w, target, advantages = inputs()

    def call(x, w):
        return sk.linear_loss(2 * x, w, target, LeavesOutTheDead(), advantages=advantages).loss

    found, expected = compiled(call)(x, w), call(x, w)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, x, w), gradients(expected, x, w))
