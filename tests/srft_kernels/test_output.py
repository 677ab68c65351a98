"""What a call returns: nodes of PyTorch's trees for whoever walks them, pickles, and metrics of what was passed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import srft_kernels as sk

from .compiling import compiled

N, H, V = 12, 8, 31


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, H, generator=g).requires_grad_() for rows in (N, V))
    return x, w, torch.randint(V, (N,), generator=g)


def outputs() -> dict[str, object]:
    """One of every kind."""
    x, w, y = tensors()
    extras = sk.Extras(rank=True, top_k=3)
    return {
        "loss": sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N)),
        "loss, extras": sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N), extras=extras),
        "reference": sk.reference.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N)),
        "logprobs": sk.linear_logprobs(x, w, y),
        "logprobs, extras": sk.linear_logprobs(x, w, y, extras=extras),
        "distillation": sk.linear_distillation(x, w, *(t.detach() for t in tensors(1)[:2])),
    }


kinds = pytest.mark.parametrize("kind", outputs())


@kinds
def test_is_a_node_of_pytorchs_trees(kind):
    out = outputs()[kind]
    leaves = pytree.tree_leaves(out)
    assert len(leaves) >= 2 and all(isinstance(leaf, Tensor) for leaf in leaves)
    assert any(leaf.requires_grad for leaf in leaves)
    mapped = pytree.tree_map(lambda leaf: leaf.detach().double(), out)
    assert type(mapped) is type(out) and pytree.tree_leaves(mapped)[0].dtype == torch.float64
    named = dict(pytree.tree_flatten_with_path(out)[0])
    assert str(next(iter(named))[0]) in (".loss", ".logprobs")
    if isinstance(out, sk.LossOutput):
        torch.testing.assert_close(mapped.metrics, out.metrics, check_dtype=False)
        assert out.metrics


@kinds
def test_goes_through_pickle(kind):
    out = pytree.tree_map(Tensor.detach, outputs()[kind])
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    for found in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), torch.load(file)):
        assert type(found) is type(out)
        for own, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(out), strict=True):
            assert torch.equal(own, other)
        if isinstance(out, sk.LossOutput):
            assert found.metrics == out.metrics and out.metrics


@kinds
def test_two_of_a_kind_are_mapped_together(kind):
    one, other = outputs()[kind], outputs()[kind]
    added = pytree.tree_map(torch.add, one, other)
    for sum_, part in zip(pytree.tree_leaves(added), pytree.tree_leaves(one)):
        assert torch.equal(sum_, 2 * part)


def test_leaves_of_one_call_in_the_structure_of_another():
    """As CUDA graphs keep it: the metrics are of the leaves."""
    x, w, y = tensors()
    given = {"advantages": torch.ones(N)}
    _, structure = pytree.tree_flatten(sk.linear_loss(x, w, y, sk.grpo(), **given))
    other = sk.linear_loss(x * 2, w, y, sk.grpo(), **given)
    assert pytree.tree_unflatten(pytree.tree_leaves(other), structure).metrics == other.metrics


def test_a_map_does_not_make_stale_metrics_fresh():
    x, w, y = tensors()
    out = sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N))
    y.zero_()
    with pytest.raises(RuntimeError, match=r"read out.metrics first"):
        pytree.tree_map(lambda leaf: leaf, out).metrics  # noqa: B018


@pytest.mark.parametrize("strict", [False, True])
def test_from_an_exported_program(strict):
    class Loss(nn.Module):
        def forward(self, x, w, y, advantages):
            return sk.linear_loss(x, w, y, sk.grpo(), advantages=advantages)

    x, w, y = (t.detach() for t in tensors())
    program = torch.export.export(Loss(), (x, w, y, torch.ones(N)), strict=strict)
    found, expected = program.module()(x * 2, w, y, -torch.ones(N)), Loss()(x * 2, w, y, -torch.ones(N))
    assert torch.equal(found.loss, expected.loss) and found.metrics == expected.metrics
    assert pickle.loads(pickle.dumps(found)).metrics == expected.metrics


def test_accuracy_does_not_follow_what_is_done_to_the_arg_max():
    x, w, _ = tensors()
    y = (x @ w.T).argmax(-1)
    out = sk.linear_loss(x, w, y, sk.sft(), extras=sk.Extras(argmax=True))
    out.extras.argmax.fill_(-1)
    try:
        assert out.metrics["accuracy"] == 1
    except RuntimeError as error:
        assert "read out.metrics first" in str(error)


def test_metrics_of_what_inference_mode_made():
    """Such tensors do not know that they were changed."""
    x, w, y = tensors()
    with torch.inference_mode():
        old = -torch.rand(N) - 1
        out = sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N), old_logprobs=old)
        expected = sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N), old_logprobs=old.clone()).metrics
        old.fill_(-9)
        assert out.metrics == expected


class Model(nn.Module):
    """Its forward returns what the loss head does."""

    def __init__(self, kind: str = "loss"):
        super().__init__()
        self.layer, self.head, self.kind = nn.Linear(H, H), nn.Linear(H, V, bias=False), kind

    def forward(self, x: Tensor, y: Tensor):
        hidden = self.layer(x)
        if self.kind == "logprobs":
            return sk.linear_logprobs(hidden, self.head.weight, y)
        if self.kind == "distillation":
            return sk.linear_distillation(hidden, self.head.weight, x, self.head.weight.detach() + 1)
        return sk.linear_loss(hidden, self.head.weight, y, sk.sft())


def total(out) -> Tensor:
    return out.loss if hasattr(out, "loss") else out.logprobs.sum()


def gradients_on_ranks(wrapper: str, kind: str) -> float:
    """The largest difference, after three steps, from one process that has every rank's tokens."""
    torch.manual_seed(0)
    model = Model(kind)
    alone, rank, size = copy.deepcopy(model), dist.get_rank(), dist.get_world_size()
    if wrapper == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    else:
        static, unused = wrapper == "DDP, static graph", wrapper == "DDP, unused parameters"
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=static, find_unused_parameters=unused)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
    worst = 0.0
    for step in range(3):
        batches = [[t.detach() for t in tensors(10 * step + r)] for r in range(size)]
        total(wrapped(batches[rank][0], batches[rank][2])).backward()
        (sum(total(alone(x, y)) for x, _, y in batches) / size).backward()
        for own, other in zip(model.parameters(), alone.parameters()):
            grad = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
            worst = max(worst, float((grad - other.grad).abs().max()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return worst


@pytest.mark.parametrize("kind", ["loss", "logprobs", "distillation"])
@pytest.mark.parametrize("wrapper", ["DDP", "DDP, static graph", "DDP, unused parameters", "FSDP2"])
def test_from_a_modules_forward_under(ranks, wrapper, kind):
    assert max(ranks(gradients_on_ranks, wrapper, kind)) < 1e-5


@pytest.mark.parametrize("kind", ["loss", "logprobs", "distillation"])
def test_from_a_checkpoint(kind):
    model = Model(kind)
    x, _, y = tensors()
    total(model(x, y)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total(checkpoint(model, x, y, use_reentrant=False)).backward()
    for own, other in zip(model.parameters(), expected):
        torch.testing.assert_close(own.grad, other)


# ---- memory that is filled anew before the backward, or before metrics are read

COLUMNS = {"advantages": torch.linspace(-1, 1, N), "old_logprobs": -torch.rand(N) - 1,
           "is_demo": torch.arange(N) % 2 > 0,
           "rewards": torch.arange(N) % 3.0, "sequence_ids": torch.arange(N) // 3}  # fmt: skip


def refilled(call, plan: sk.Plan | None) -> list[Tensor]:
    """Gradients where every annotation is written over between the call and its backward."""
    x, w, y = tensors()
    given = {name: column.clone() for name, column in COLUMNS.items()}
    y = y.int() if plan is not None and plan.block_rows == 1 else y
    loss = call(x, w, y, plan, given)
    for buffer in (y, *given.values()):
        buffer.copy_(buffer.flip(0))
    return [*torch.autograd.grad(loss, (x, w))]


def of_all_tokens(stats: sk.TokenStats, tokens: sk.Tokens) -> Tensor:
    return -tokens.advantages * stats.logprobs * stats.entropy.mean()


of_all_tokens.token_local = False


def with_(objective):
    def call(x, w, y, plan, given):
        reads = ("advantages",) if objective is of_all_tokens else objective.reads
        given = {name: column for name, column in given.items() if name in reads}
        return sk.linear_loss(x, w, y, objective, plan=plan, **given).loss

    return call


CALLS = {
    "none": lambda x, w, y, plan, given: sk.linear_cross_entropy(x, w, y, plan=plan, reduction="none").mean(),
    "mean": lambda x, w, y, plan, given: sk.linear_cross_entropy(x, w, y, plan=plan, label_smoothing=0.1),
    "logprobs": lambda x, w, y, plan, given: sk.linear_logprobs(x, w, y, plan=plan).logprobs.sum(),
    "grpo": with_(sk.grpo()),
    "srft": with_(sk.srft_paper()),
    "gspo": with_(sk.gspo()),
    "of all tokens": with_(of_all_tokens),
}
PLANS = {"default": None, "two passes": sk.Plan(passes=2, chunk_rows=5), "in place": sk.Plan(passes=2, compact=False),
         "int32": sk.Plan(block_rows=1, passes=2)}  # fmt: skip


@pytest.mark.parametrize("in_a_graph", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_buffers_refilled_before_the_backward(call, plan, in_a_graph):
    """Gradients of what was passed, or autograd's refusal; never those of what is there now."""
    torch._dynamo.reset()
    x, w, y = tensors()
    expected = torch.autograd.grad(call(x, w, y, plan, COLUMNS), (x, w))
    try:
        found = refilled(torch.compile(call, backend="aot_eager") if in_a_graph else call, plan)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for own, other in zip(found, expected):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("changed", ["target", "advantages", "is_demo", "weight", "out.logprobs"])
@pytest.mark.parametrize("in_a_graph", [False, True])
@pytest.mark.parametrize("first", [0, 1])  # a token of weight 0 is left out, and what is passed of the others copied
def test_buffers_refilled_before_metrics_are_read(changed, in_a_graph, first):
    x, w, y = tensors()
    given = {name: COLUMNS[name].clone() for name in ("advantages", "is_demo", "rewards")}
    given["token_weight"] = weight = torch.arange(first, N + first) / N
    call = lambda: sk.linear_loss(x, w, y, sk.srft_paper(), extras=sk.Extras(argmax=True), **given)  # noqa: E731
    expected = call().metrics
    out = compiled(call)() if in_a_graph else call()
    written = {"target": y, "weight": weight, "out.logprobs": out.logprobs, **given}[changed]
    with torch.no_grad():
        written.copy_(written.flip(0))
    try:
        found = out.metrics
    except RuntimeError as error:
        assert first and not in_a_graph and "read out.metrics first" in str(error)
        return
    assert in_a_graph or not first
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_metrics_are_kept_once_read():
    x, w, y = tensors()
    out = sk.linear_loss(x, w, y, sk.grpo(), advantages=torch.ones(N))
    before = out.metrics
    y.zero_()
    assert out.metrics is before
