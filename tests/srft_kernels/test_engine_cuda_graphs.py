"""On CUDA: nothing in a call waits for the device, and everything runs on the caller's stream, captured or not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import srft_kernels as sk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
N, H, V = 96, 64, 5000


def inputs(seed: int, device: str = "cuda") -> dict[str, Tensor]:
    """A third of the tokens is ignored, other ones for each seed."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(V, (N,), generator=generator)
    made = {
        "x": torch.randn(N, H, generator=generator).bfloat16(),
        "w": torch.randn(V, H, generator=generator).bfloat16() / 8,
        "target": torch.where(torch.rand(N, generator=generator) < 1 / 3, -100, target),
        "advantages": torch.randn(N, generator=generator),
        "rewards": torch.randint(2, (N,), generator=generator).float(),
        "is_demo": torch.rand(N, generator=generator) < 0.4,
    }
    made = {name: tensor.to(device) for name, tensor in made.items()}
    for name in ("x", "w"):
        made[name].requires_grad_()
    return made


def call(objective: Callable, **options) -> Callable:
    def step(given: dict[str, Tensor]) -> list[Tensor]:
        columns = {name: given[name] for name in ("advantages", "rewards", "is_demo")}
        out = sk.linear_loss(given["x"], given["w"], given["target"], objective, **columns, **options)
        gradients = torch.autograd.grad(out.loss, (given["x"], given["w"]))
        return [out.loss.detach(), out.logprobs, out.entropy, *gradients, *out.metrics.values()]

    return step


def cross_entropy(given: dict[str, Tensor]) -> list[Tensor]:
    loss = sk.linear_cross_entropy(given["x"], given["w"], given["target"], label_smoothing=0.1, z_loss=1e-4)
    return [loss.detach(), *torch.autograd.grad(loss, (given["x"], given["w"]))]


CALLS = {
    "srft_paper": call(sk.srft_paper()),
    "three chunks": call(sk.srft_official(), plan=sk.Plan(backend="triton", chunk_rows=32)),
    "callable": call(lambda stats, tokens: -tokens.advantages * stats.logprobs - 0.1 * stats.entropy),
    "two passes": call(sk.reinforce(entropy_coef=0.1), plan=sk.Plan(backend="triton", chunk_rows=32, passes=2)),
    "torch rows": call(sk.srft_paper(), plan=sk.Plan(backend="torch", chunk_rows=32)),
    "filter": call(sk.srft_paper(), plan=sk.Plan(backend="triton", chunk_rows=32, filter=sk.Filter())),
    "filter, always dense": call(
        sk.srft_paper(), plan=sk.Plan(backend="triton", chunk_rows=32, filter=sk.Filter(max_relative_error=1e-9))
    ),
    "extras": call(sk.srft_paper(), extras=sk.Extras(rank=True, argmax=True, top_k=4)),
    "cross-entropy": cross_entropy,
}
every_call = pytest.mark.parametrize("step", CALLS.values(), ids=CALLS)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-2 if own.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def compiled(step: Callable) -> None:
    step(inputs(9))
    torch.cuda.synchronize()


@every_call
def test_a_captured_call_replays_with_other_inputs(step):
    static = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (1, 2):
        new = inputs(seed)
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(new[name])
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(new))


@every_call
def test_runs_on_the_callers_stream(step):
    """The stream is late with the inputs: whoever does not wait for it sees others."""
    compiled(step)
    given, new = inputs(0), inputs(1)
    expected = step(new)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for name, tensor in given.items():
                tensor.copy_(new[name])
        found = step(given)
    stream.synchronize()
    assert_same(found, expected)


@every_call
def test_never_waits_for_the_device(step):
    compiled(step)
    given = inputs(0)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_scoring_never_waits_for_the_device():
    given = inputs(0)
    score = lambda: sk.linear_logprobs(given["x"].detach(), given["w"].detach(), given["target"])  # noqa: E731
    score()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        score()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_call
def test_two_threads_with_streams_of_their_own(step):
    compiled(step)
    expected = [step(inputs(seed)) for seed in (0, 1)]
    torch.cuda.synchronize()

    def work(seed: int) -> list[list[Tensor]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            given = inputs(seed)
            found = [step(given) for _ in range(5)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        for found, right in zip(pool.map(work, (0, 1)), expected):
            for once in found:
                assert_same(once, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_call
def test_tensors_need_not_be_on_the_current_device(step):
    expected = step(inputs(0))
    found = step(inputs(0, "cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert_same([tensor.to("cuda:0") for tensor in found], expected)
