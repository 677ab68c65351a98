"""Ranks, arg-max, top-k and candidates: from every plan, on every head, and at no cost where nobody asks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import srft_kernels as sk
from srft_kernels.extras import GROUP, largest

from .cases import BACKENDS, IGNORED, KINDS, error, problem
from .counting import Recorder

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


def asked(p, plan, extras, call="loss", **head):
    """(TokenExtras, metrics) of a problem; a third of the tokens has no weight, and is read apart from the others."""
    tensors, head = p.leaves()[:2], {"linear_bias": p.bias, **p.head, **head}
    weight = (torch.arange(len(p.target)) % 3).float()
    if call == "logprobs":
        return sk.linear_logprobs(*tensors, p.target, plan=plan, extras=extras, **head).extras, None
    objective = sk.sft() if call == "loss" else lambda stats, tokens: -stats.logprobs
    out = sk.linear_loss(*tensors, p.target, objective, token_weight=weight, plan=plan, extras=extras, **head)
    return out.extras, out.metrics


def full(p, dtype, **head):
    """Logits z of every token as the specification has them, in a type."""
    bias = None if p.bias is None else p.bias.to(dtype)
    return sk.reference.logits(p.input.to(dtype), p.weight.to(dtype), linear_bias=bias, **p.head, **head)


def compare(found, p, candidates, k, **head):
    """Integers exactly, by the logits in fp64; log-probs to twice the error of eager PyTorch."""
    live, ids = p.live, p.target.clamp(min=0)[:, None]
    z, eager = full(p, torch.float64, **head), full(p, torch.float32, **head).log_softmax(-1)
    truth = z.log_softmax(-1)
    assert (found.rank == torch.where(live, (z > z.gather(1, ids)).sum(-1), -1)).all()
    assert (found.argmax == torch.where(live, z.argmax(-1), -1)).all()
    top = z.topk(k).values
    picked = z.gather(1, found.top_ids.clamp(min=0))
    assert (picked == top)[live].all() and (found.top_ids[~live] == -1).all()
    assert all(len(set(row.tolist())) == k for row in found.top_ids[live])
    for own, where in ((found.top_logprobs, found.top_ids.clamp(min=0)), (found.candidate_logprobs, candidates)):
        assert (own[~live] == 0).all()
        right, usual = truth.gather(1, where)[live], eager.gather(1, where)[live]
        size = right[right.isfinite()].abs().max()
        assert error(own[live], right) <= 2 * error(usual, right) + 4 * torch.finfo(torch.float32).eps * size


# not where the logits are inexact in fp32, nor where even fp64 rounds different ones to the cap
@BOTH
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gaussian", "softcap_huge")])
def test_exact(kind, backend):
    p = problem(kind)
    size = p.head.get("vocab_size", len(p.weight))
    candidates = torch.randint(size, (len(p.target), 4), generator=torch.Generator().manual_seed(1))
    k = 3 if kind != "banned" else 60
    extras = sk.Extras(rank=True, argmax=True, top_k=k, candidates=candidates)
    calls = ("loss", "callable", "logprobs") if backend == "torch" else ("loss",)
    for call in calls:
        plan = sk.Plan(backend=backend, chunk_rows=5, block_rows=3, passes=1)
        found, metrics = asked(p, plan, extras, call)
        compare(found, p, candidates, k)
        if metrics is not None:
            live = p.live
            assert metrics["accuracy"] == (found.argmax == p.target)[live].float().mean()


@BOTH
@pytest.mark.parametrize("call", ["loss", "callable", "logprobs"])
@pytest.mark.parametrize(
    "plan",
    [
        {"passes": 2},
        {"compact": False},
        {"compact": False, "batch_invariant": True},
        {"batch_invariant": True, "passes": 2},
    ],
    ids=str,
)
def test_plans(backend, plan, call, monkeypatch):
    monkeypatch.setattr(sk.extras, "BIASED_ROWS", 3)  # of a chunk of 4
    p = problem("everything")
    p.input[~p.live] = torch.nan  # what an ignored token holds reaches nothing
    candidates = torch.randint(100, (len(p.target), 2))
    candidates[~p.live] = -7
    extras = sk.Extras(True, True, 2, candidates)
    found, _ = asked(p, sk.Plan(backend=backend, chunk_rows=4, block_rows=2, **plan), extras, call)
    p.input[~p.live] = 0
    compare(found, p, candidates.clamp(min=0), 2)


@BOTH
def test_rows_without_a_distribution(backend):
    """NaN, all banned: no rank, no arg-max; a target of probability 0 has a rank; banned entries are not listed."""
    rows = torch.zeros(4, 40)
    rows[0] = torch.arange(40)
    rows[1, 7] = torch.nan
    rows[2] = rows[3, 3:] = -torch.inf
    plan, extras = sk.Plan(backend=backend), sk.Extras(True, True, 5)
    found = [  # as a bias, since 0 · ∞ is in a product
        sk.linear_logprobs(torch.zeros(1, 1), torch.zeros(40, 1), torch.tensor([20]), linear_bias=row, plan=plan,
                           extras=extras).extras
        for row in rows
    ]  # fmt: skip
    assert [e.rank.item() for e in found] == [19, -1, -1, 3]
    assert [e.argmax.item() for e in found] == [39, -1, -1, 0]
    assert found[0].top_ids.tolist() == [[39, 38, 37, 36, 35]]
    for bad in found[1:3]:
        assert bad.top_ids.tolist() == [[-1] * 5] and bad.top_logprobs.isnan().all()
    assert sorted(found[3].top_ids.tolist()[0]) == [-1, -1, 0, 1, 2]
    assert found[3].top_logprobs[0, 3:].tolist() == [-torch.inf] * 2


@BOTH
def test_ties(backend):
    """Entries that tie with the target do not count; the first of several largest is the arg-max."""
    bias = torch.tensor([1.0, 5.0, 2.0, 5.0, 2.0]).repeat(30)
    x, w, y, plan = torch.zeros(2, 1), torch.zeros(150, 1), torch.tensor([2, 3]), sk.Plan(backend=backend)
    found = sk.linear_logprobs(x, w, y, linear_bias=bias, plan=plan, extras=sk.Extras(True, True)).extras
    assert found.rank.tolist() == [60, 0] and found.argmax.tolist() == [1, 1]


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 640, 641, 5000])
@pytest.mark.parametrize("k", [1, 9, 64])
def test_largest(vocab, k):
    """Two levels of groups against a sort; many ties, and rows with a wider stride."""
    if k > vocab:
        return
    a = torch.randint(-40, 40, (6, vocab + 7)).float()[:, :vocab]
    a[1] = -torch.inf
    a[2, vocab // 2] = torch.inf
    a[3, -1] = 100  # among those that fill no group
    values, ids = largest(a, k)
    assert torch.equal(values, a.sort(descending=True).values[:, :k])
    assert torch.equal(a.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert GROUP == 64  # or choose other sizes above


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def plain_calls(backend, passes, **options):
    x, w, y = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True), torch.arange(12)
    y[::3] = IGNORED
    plan = sk.Plan(backend=backend, chunk_rows=5, block_rows=2, passes=passes)
    with Calls() as calls:
        sk.linear_loss(x, w, y, sk.sft(), plan=plan, **options).loss.backward()
        sk.linear_logprobs(x, w, y, plan=plan, **options)
    return calls.count


@BOTH
@pytest.mark.parametrize("passes", [1, 2])
def test_costs_nothing_where_nobody_asks(backend, passes, monkeypatch):
    """As many PyTorch calls as with the code taken out, and none of it is reached."""
    usual = plain_calls(backend, passes)
    assert usual == plain_calls(backend, passes, logit_scale=1.0, temperature=1, extras=None)
    assert plain_calls(backend, passes, extras=sk.Extras(rank=True)) > usual
    monkeypatch.setattr(sk.extras.TokenExtras, "empty", None)
    monkeypatch.setattr(sk.extras.ExtrasBuffer, "__getitem__", None)
    assert plain_calls(backend, passes) == usual


@BOTH
def test_no_product_and_no_logits_more(backend):
    """Not a matrix product more, and no tensor of a chunk's size beside the logits."""
    x, w, y = torch.randn(32, 16), torch.randn(1000, 16), torch.arange(32)
    costs = []
    for extras in (None, sk.Extras(True, True, 4, y[:, None])):
        with Recorder() as cost:
            sk.linear_logprobs(x, w, y, plan=sk.Plan(backend=backend, chunk_rows=32, block_rows=2), extras=extras)
        costs.append((cost.flops, cost.largest))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_live_tokens_than_said(backend, monkeypatch):
    monkeypatch.setattr(sk.checks, "may_look", lambda tensor: False)
    x, w, y = torch.randn(6, 4), torch.randn(9, 4), torch.tensor([0, 1, 2, IGNORED, 4, 5])
    found = sk.linear_logprobs(x, w, y, live_tokens=3, plan=sk.Plan(backend=backend, compact=False),
                               extras=sk.Extras(True, True, 2, y[:, None].clamp(min=0) + 40)).extras  # fmt: skip
    assert (found.rank == -1).all() and found.top_logprobs[:2].isnan().all()
    found = sk.linear_logprobs(x, w, y, plan=sk.Plan(backend=backend, compact=False),
                               extras=sk.Extras(candidates=torch.tensor([[2, 9, -1]]).expand(6, 3))).extras  # fmt: skip
    out_of_range = torch.tensor([False, True, True]).expand(6, 3) & (y != IGNORED)[:, None]
    assert torch.equal(found.candidate_logprobs.isnan(), out_of_range)


REFUSED = [
    (lambda: sk.Extras(rank=1), TypeError, r"Extras\(rank=1\): expected True or False"),
    (lambda: sk.Extras(top_k=65), ValueError, r"Extras\(top_k=65\): expected a number of entries in \[0, 64\]"),
    (lambda: sk.Extras(candidates=[1]), TypeError, "must be a tensor .* found list"),
    (lambda: {"rank": True}, TypeError, "extras must be an Extras, found"),
    (lambda: sk.Extras(top_k=8), ValueError, r"Extras\(top_k=8\), but there are 7 entries"),
    (lambda: sk.Extras(candidates=torch.zeros(3, dtype=torch.long)), ValueError, r"\(3, 'C'\), found \(3,\)"),
    (lambda: sk.Extras(candidates=torch.zeros(3, 2)), TypeError, "integer token ids, found torch.float32"),
    (lambda: sk.Extras(candidates=torch.tensor([[0], [7], [99]])), ValueError,
     r"candidates\[1, 0\] = 7 lies outside \[0, 7\)"),
]  # fmt: skip


@pytest.mark.parametrize("extras, kind, message", REFUSED)
def test_refused(extras, kind, message):
    with pytest.raises(kind, match=message):
        sk.linear_logprobs(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, IGNORED]), extras=extras())
