"""Nothing of size N·V is ever made, whatever the plan: every operation of forward and backward is watched."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import BACKENDS, IGNORED
from .counting import Recorder

N, H, V, ROWS = 96, 4, 300, 8
backends = pytest.mark.parametrize("backend", BACKENDS)


def largest(function, backend: str, passes: int | None, dtype: torch.dtype, **plan) -> tuple[int, int]:
    """Numbers in the largest storage of (forward, backward)."""
    x, w, b = (torch.randn(*s).to(dtype).requires_grad_() for s in ((N, H), (V, H), (V,)))
    y = torch.randint(V, (N,))
    y[::5] = IGNORED
    plan = sk.Plan(backend=backend, chunk_rows=ROWS, block_rows=4, passes=passes, **plan)
    with Recorder() as forward:
        loss = function(x, w, y, b, plan)
    with Recorder() as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.largest, backward.largest


COLUMNS = {
    "advantages": torch.linspace(-1, 1, N),
    "is_demo": torch.arange(N) % 2 == 0,
    "rewards": torch.ones(N),
    "sequence_ids": torch.arange(N) // 12,
}


def loss_of(objective):
    return lambda x, w, y, b, plan: sk.linear_loss(x, w, y, objective, linear_bias=b, plan=plan, **COLUMNS).loss


def summed_statistics(x, w, y, b, plan):
    return sum(f.sum() for f in sk.linear_logprobs(x, w, y, linear_bias=b, softcap=5.0, plan=plan).fields())


def cross_entropy(x, w, y, b, plan):
    options = {"reduction": "none", "label_smoothing": 0.1, "weight": torch.ones(V)}
    return sk.linear_cross_entropy(x, w, y, linear_bias=b, plan=plan, **options).sum()


FUNCTIONS = {
    "sft": (loss_of(sk.sft()), (1, 2)),
    "srft": (loss_of(sk.srft_official()), (1, 2)),
    "srft_sequence": (loss_of(sk.srft_hpt()), (None,)),
    "callable": (loss_of(lambda stats, tokens: -stats.logprobs * tokens.advantages), (1, 2)),
    "statistics": (summed_statistics, (None,)),
    "cross_entropy": (cross_entropy, (None,)),
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, passes", [(n, p) for n, (_, passes) in FUNCTIONS.items() for p in passes])
def test_largest_block_is_a_chunk(backend, name, passes, dtype):
    function, _ = FUNCTIONS[name]
    chunk = ROWS * -(-V // 16) * 16  # rows are padded to a multiple of 16
    assert max(largest(function, backend, passes, dtype)) == chunk < N * V / 10


@backends
def test_scoring_makes_one_chunk_alone(backend):
    with torch.no_grad():
        forward, _ = largest(summed_statistics, backend, None, torch.float32)
    assert forward < N * V / 10


def test_one_pass_keeps_only_gradients_for_backward():
    """Between forward and backward there is dx, dW, db and n-long vectors: counted by what the graph saved."""
    saved = []
    x, w, y = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True), torch.randint(V, (N,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sk.linear_loss(x, w, y, sk.sft(), plan=sk.Plan(chunk_rows=ROWS))
        assert saved == []
        sk.linear_loss(x, w, y, sk.sft(), plan=sk.Plan(chunk_rows=ROWS, passes=2))
    assert max(saved) <= max(V * H, N * H)


def test_default_plan_keeps_its_promise():
    """The workspace that a plan counts is what the largest chunk and its scratch take."""
    plan = sk.Plan.choose(N, H, V, torch.float32, "cpu", workspace_bytes=40_000)
    assert plan.workspace_bytes <= 40_000
    x, w, y = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(V, (N,))
    with Recorder() as forward:
        sk.linear_loss(x, w, y, sk.sft(), plan=plan)
    assert forward.largest * 4 <= 40_000 * 304 / 300
