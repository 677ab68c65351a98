"""A head divided over ranks against one process: real processes, gloo, the rule of cases.py."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import srft_kernels as sk
from bench.ranks import Ranks
from srft_kernels import checks

from .cases import FP16_KINDS, KINDS, Problem, Result, assert_exact, eager, ours, problem, truth
from .mixed import mixed_products
from .test_exactness import columns_of, everything

PADDING = 7  # head rows that do not exist, beside those of a problem's own
PRESETS = [name for name in vars(sk.presets) if callable(getattr(sk, name, None)) and name.islower()]


# What runs on the ranks


def cuts(p: Problem, count: int) -> list[int]:
    """Where the rows of the head are cut: uneven parts, one of two rows, and on 4 ranks one that is all padding."""
    rows = len(p.weight)
    return [0, rows // 3, *([rows // 3 + 2, rows] if count == 4 else []), rows + PADDING]


def padded(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_full((PADDING, *rows.shape[1:]), torch.nan)])


def part(p: Problem, group: dist.ProcessGroup | None = None) -> Problem:
    """This rank's."""
    group = group or dist.group.WORLD
    cut, rank = cuts(p, dist.get_world_size(group)), dist.get_rank(group)
    mine = slice(cut[rank], cut[rank + 1])
    head = {"vocab_size": len(p.weight), **p.head, "group": group}
    return replace(p, weight=padded(p.weight)[mine], bias=None if p.bias is None else padded(p.bias)[mine], head=head)


def shared(p: Problem, objective, plan: sk.Plan | None, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return ours(part(p), objective, plan, **columns).values


def call(function: str, p: Problem, wanted: str, options: dict) -> dict[str, Tensor]:
    """What a function returns, and the gradients to x, W, b in `wanted` of a sum with other factors each; on a rank,
    or, where there are none, in one process."""
    class_weight = options.get("weight")
    if dist.is_initialized():
        if class_weight is not None:
            options = options | {"weight": part(replace(p, bias=class_weight)).bias}
        p = part(p)
    leaves = dict(zip("xWb", p.leaves()))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    out = getattr(sk, function)(leaves["x"], leaves["W"], p.target, linear_bias=leaves.get("b"), **p.head, **options)
    outs = {"loss": out} if isinstance(out, Tensor) else {n: v for n, v in vars(out).items() if isinstance(v, Tensor)}
    if wanted:
        factor = lambda value: torch.arange(1, value.numel() + 1).view(value.shape)  # noqa: E731
        total = sum((value * factor(value)).sum() for value in outs.values() if value.requires_grad)
        total.backward()
    return {name: value.detach() for name, value in outs.items()} | {name: leaves[name].grad for name in wanted}


# What compares


def whole(parts: list[dict[str, Tensor]], p: Problem) -> dict[str, Tensor]:
    """One process's results from all ranks': what is not of the head must be the same bit for bit."""
    result = dict(parts[0])
    for name, value in result.items():
        if name in ("dW", "db", "W", "b"):
            of_rows = torch.cat([values[name] for values in parts])
            assert (of_rows[len(p.weight) :] == 0).all(), f"{name} of padding"
            result[name] = of_rows[: len(p.weight)]
        else:
            assert all(torch.equal(value.nan_to_num(), other[name].nan_to_num()) for other in parts), f"{name} differs"
    return result


def check(ranks: Ranks, p: Problem, plan: sk.Plan, objective=everything, **columns: Tensor) -> None:
    """The rule, against fp64."""
    columns = columns or columns_of(p)
    found = Result(whole(ranks(shared, p, objective, plan, columns), p))
    assert_exact(found, eager(p, objective, plan, **columns), truth(p, objective, **columns), plan)


def check_same(ranks: Ranks, function: str, p: Problem, wanted: str = "xWb", **options) -> dict[str, Tensor]:
    """As one process, but for the order of sums; returns its results."""
    found, one = whole(ranks(call, function, p, wanted, options), p), call(function, p, wanted, options)
    assert found.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)
    return found


def plan_of(passes: int | None, backend: str = "torch", **options) -> sk.Plan:
    return sk.Plan(backend=backend, chunk_rows=5, block_rows=3, passes=passes, **options)


passes_of = pytest.mark.parametrize("passes", [1, 2])


@passes_of
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(ranks, kind, passes):
    check(ranks, problem(kind), plan_of(passes))


@passes_of
@pytest.mark.parametrize("kind", KINDS)
def test_bf16(ranks, kind, passes):
    check(ranks, problem(kind, dtype=torch.bfloat16), plan_of(passes))


def mixed(p: Problem, objective, plan: sk.Plan, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    with mixed_products():
        return shared(p, objective, plan, columns)


@passes_of
@pytest.mark.parametrize("gradient_rows", [5, 10, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_beside_the_logits(ranks, dtype, gradient_rows, passes):
    """As on CUDA: also on the rank whose part is all padding."""
    p, plan = problem("everything", dtype=dtype), plan_of(passes, gradient_rows=gradient_rows)
    columns = columns_of(p)
    found = Result(whole(ranks(mixed, p, everything, plan, columns), p))
    assert_exact(found, eager(p, everything, plan, **columns), truth(p, everything, **columns), plan)


@pytest.mark.parametrize("kind", ["random", "peaked", "softcap", "padded"])
def test_fp16(ranks, kind):
    assert kind in FP16_KINDS
    check(ranks, problem(kind, dtype=torch.float16), plan_of(1))


@passes_of
@pytest.mark.parametrize("kind", ["everything", "peaked", "banned"])
def test_triton_rows(ranks, kind, passes):
    pytest.importorskip("triton")
    check(ranks, problem(kind), plan_of(passes, "triton"))


def rollouts(p: Problem) -> dict[str, Tensor]:
    n = torch.arange(len(p.target))
    logprobs = {name: -torch.rand(len(n)) * 6 for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")}
    return {"advantages": (n % 5 - 2) / 2, "is_demo": n % 2 == 0, "rewards": (n % 3 - 1) / 1.0, "sequence_ids": n // 3,
            **logprobs}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(ranks, preset):
    p = problem("bias")
    for plan in (None, plan_of(2)):
        objective = getattr(sk, preset)(entropy_coef=0.1)
        check_same(ranks, "linear_loss", p, objective=objective, plan=plan, **rollouts(p))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class weights"])
def test_cross_entropy(ranks, weighted, reduction):
    """Label smoothing, whose sums run over all ranks, and class weights divided like the head."""
    p = problem("bias" if weighted else "everything", vocab=40)
    weight = {"weight": torch.rand(len(p.weight))} if weighted else {}
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "reduction": reduction, **weight}
    for passes in (1, 2):
        check_same(ranks, "linear_cross_entropy", p, plan=plan_of(passes), **options)


def test_smoothing_in_triton_rows(ranks):
    pytest.importorskip("triton")
    for passes in (1, 2):
        check_same(
            ranks,
            "linear_cross_entropy",
            problem("bias", tokens=5),
            plan=plan_of(passes, "triton"),
            label_smoothing=0.2,
        )


def test_statistics_are_differentiated_freely(ranks):
    check_same(ranks, "linear_logprobs", problem("bias"), plan=plan_of(None))


@pytest.mark.parametrize("wanted", ["x", "W", "b", "xb", ""])
def test_frozen_parts(ranks, wanted):
    for passes in (1, 2):
        check_same(ranks, "linear_loss", problem("bias"), wanted, objective=sk.sft(), plan=plan_of(passes))


@pytest.mark.parametrize("tokens, ignored", [(0, 0), (6, 1)], ids=["none", "all ignored"])
def test_no_live_token(ranks, tokens, ignored):
    p = problem("bias", tokens=6, ignored=ignored)
    p = replace(p, input=p.input[:tokens], target=p.target[:tokens])
    assert check_same(ranks, "linear_loss", p, objective=sk.sft())["loss"] == 0


def test_ignored_tokens_that_nobody_counts(ranks):
    """As on a GPU: dead rows among the live ones."""
    for passes in (1, 2):
        for live_tokens in (None, 12):
            check_same(
                ranks, "linear_loss", problem("bias"), objective=sk.sft(), plan=plan_of(passes, compact=False),
                live_tokens=live_tokens,
            )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_part_where_all_is_banned(ranks, backend):
    """Its maximum is −inf, which must not be subtracted from itself; a target there has ℓ = −inf, and that is all."""
    p = problem("banned", tokens=5, ignored=0)
    first = cuts(p, ranks.count)[1]
    p.bias[:first] = -torch.inf
    p.target[:] = torch.where(p.target < first, first + 1, p.target)
    p.bias[p.target] = 0
    for passes in (1, 2):
        check(ranks, p, plan_of(passes, backend))
    p.target[3] = 0
    found = check_same(ranks, "linear_loss", p, objective=sk.sft(), plan=plan_of(1, backend))
    assert found["loss"] == torch.inf and found["logprobs"][3] == -torch.inf
    assert all(found[name].isfinite().all() for name in "xWb")


def unchecked(p: Problem, passes: int) -> dict[str, Tensor]:
    """As on a GPU, where nobody looks at the targets."""
    may_look, checks.may_look = checks.may_look, lambda tensor: False
    try:
        return call("linear_loss", p, "xWb", {"objective": sk.sft(), "plan": plan_of(passes, compact=False)})
    finally:
        checks.may_look = may_look


def test_a_target_of_no_rank(ranks):
    """One that lies on another rank adds nothing here, one past the vocabulary, though in a padding row, is NaN."""
    p = problem("bias", ignored=0)
    p.target[2] = len(p.weight) + 1
    for passes in (1, 2):
        parts = ranks(unchecked, p, passes)
        for values in parts:
            wrong = values["logprobs"].isnan()
            assert wrong.tolist() == [i == 2 for i in range(len(wrong))]
            assert values["x"][2].isnan().all() and values["x"][:2].isfinite().all() and values["loss"].isnan()


def collectives(p: Problem, frozen: bool) -> dict[str, int]:
    counts = {}

    def counted(name, function):
        def collective(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return collective

    originals = dist.all_gather, dist.all_reduce
    dist.all_gather, dist.all_reduce = counted("gather", originals[0]), counted("sum", originals[1])
    try:
        call("linear_loss", p, "W" if frozen else "xW", {"objective": sk.sft(), "plan": plan_of(1)})
    finally:
        dist.all_gather, dist.all_reduce = originals
    return counts


def test_collectives(ranks):
    """One gather before all others, then one for each chunk's statistics, and one sum of its dx."""
    p = problem(tokens=15, ignored=0)
    assert set(map(str, ranks(collectives, p, False))) == {"{'gather': 4, 'sum': 3}"}
    assert set(map(str, ranks(collectives, p, True))) == {"{'gather': 4}"}


def score(p: Problem, tokens: int) -> Tensor:
    p = part(replace(p, input=p.input[:tokens], target=p.target[:tokens]))
    with torch.no_grad():
        return sk.linear_logprobs(
            p.input, p.weight, p.target, plan=plan_of(None, batch_invariant=True), **p.head
        ).logprobs


def test_scoring_is_batch_invariant(ranks):
    p = problem("gaussian", tokens=16, ignored=0)
    few, many = ranks(score, p, 3)[0], ranks(score, p, 16)[0]
    assert torch.equal(few, many[:3])


def accumulated(p: Problem) -> dict[str, Tensor]:
    p = part(p)
    x, w = p.leaves()
    master = torch.ones_like(w)
    sk.linear_loss(x, w, p.target, sk.sft(), weight_grad=master, plan=plan_of(1), **p.head).loss.backward()
    assert w.grad is None
    return {"x": x.grad, "W": master - 1}


def test_a_gradient_that_is_given(ranks):
    p = problem(tokens=15)
    one = call("linear_loss", p, "xW", {"objective": sk.sft()})
    found = whole(ranks(accumulated, p), p)
    for name in "xW":
        torch.testing.assert_close(found[name], one[name], rtol=1e-5, atol=1e-6)


def of_a_few(p: Problem) -> dict[str, Tensor] | None:
    group = dist.new_group([1, 2] if dist.get_world_size() == 4 else [0, 1])
    if not isinstance(group, dist.ProcessGroup):
        return None
    p = part(p, group)
    x, w = p.leaves()
    sk.linear_loss(x, w, p.target, sk.sft(), **p.head).loss.backward()
    return {"x": x.grad, "W": w.grad}


def test_ranks_outside_of_the_group_do_not_call(ranks):
    """As in a pipeline, whose last stage alone has the head."""
    p = problem(tokens=15)
    one = call("linear_loss", p, "xW", {"objective": sk.sft()})
    found = [values for values in ranks(of_a_few, p) if values is not None]
    assert len(found) == 2
    found = whole(found, p)
    for name in "xW":
        torch.testing.assert_close(found[name], one[name], rtol=1e-5, atol=1e-6)


def on_a_mesh(p: Problem) -> dict[str, Tensor]:
    """The head divided within pairs of ranks, the tokens between the pairs."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("pairs", "within"))
    between = mesh.get_group("pairs")
    pair, pairs = dist.get_rank(between), dist.get_world_size(between)
    x, target = (t.tensor_split(pairs)[pair] for t in (p.input, p.target))
    p = part(replace(p, input=x, target=target), mesh.get_group("within"))
    x, w = p.leaves()
    loss = sk.linear_loss(x, w, p.target, sk.sft(), token_group=between, plan=plan_of(1), **p.head).loss
    loss.backward()
    loss = loss.detach()
    for each in (loss, w.grad):
        dist.all_reduce(each, group=between)
    return {"loss": loss, "x": x.grad, "W": w.grad}


def test_the_head_and_the_tokens_are_divided_both(ranks):
    p = problem(tokens=15)
    one, found = call("linear_loss", p, "xW", {"objective": sk.sft()}), ranks(on_a_mesh, p)
    pairs = [whole(found[first : first + 2], p) for first in range(0, ranks.count, 2)]
    torch.testing.assert_close(torch.cat([pair["x"] for pair in pairs]), one["x"], rtol=1e-5, atol=1e-6)
    for pair in pairs:
        for name in ("loss", "W"):
            torch.testing.assert_close(pair[name], one[name], rtol=1e-5, atol=1e-6)


def copies_of_a_module(p: Problem) -> tuple[list[float], str]:
    """Losses of a module, of a copy, and of what was saved without its group; what saving it with one says."""
    p = part(p)
    module = sk.SRFTLoss(sk.sft(), **p.head)
    copied = copy.deepcopy(torch.nn.ModuleList([module, module]))
    assert copied[0] is copied[1] and copied[0] is not module and copied[0].options is not module.options
    assert copied.state_dict() == {} and not copied.load_state_dict({}).missing_keys
    with pytest.raises(TypeError) as refused:
        pickle.dumps(module)
    group = module.options.pop("group")
    loaded = pickle.loads(pickle.dumps(module))
    module.options["group"] = loaded.options["group"] = group
    return [each(p.input, p.weight, p.target).loss.item() for each in (module, copied[0], loaded)], str(refused.value)


def test_copies_of_a_module_share_its_group_and_saving_it_is_refused(ranks):
    p = problem(tokens=15)
    one = sk.linear_loss(p.input, p.weight, p.target, sk.sft(), **p.head).loss.item()
    for losses, refused in ranks(copies_of_a_module, p):
        assert losses == pytest.approx([one] * 3, rel=1e-6)
        assert re.match(r"SRFTLoss\(group=...\) holds a process group.*: save its state_dict\(\)", refused)


def partial_gradients(call_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """(gradients with partial_input_grad, dx summed over the ranks here; without; collectives of dx saved)."""
    p = problem(ignored=0.3)
    columns = {"reduction": "none"} if call_name == "linear_cross_entropy" else {}
    columns = {"objective": sk.sft()} if call_name == "linear_loss" else columns
    found, sums, reduce = [], [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: sums.append(1) or reduce(*args, **kwargs)
    try:
        for partial in (True, False):
            found.append(call(call_name, p, "xW", {**columns, "partial_input_grad": partial}))
            sums.append(0)
    finally:
        dist.all_reduce = reduce
    dist.all_reduce(found[0]["x"])
    return *found, sum(sums[sums.index(0) :]) - sum(sums[: sums.index(0)])


@pytest.mark.parametrize("name", ["linear_loss", "linear_logprobs", "linear_cross_entropy"])
def test_partial_gradients_to_the_hidden_states_add_up_to_the_whole(ranks, name):
    """For callers that add them up themselves, as verl's and Megatron's do; one collective less."""
    for partial, whole_, saved in ranks(partial_gradients, name):
        assert saved == 1
        for key in whole_:
            torch.testing.assert_close(partial[key], whole_[key])


def test_heads_that_are_not_filled_yet_are_no_whole_heads(ranks):
    """All rows alike on all ranks says nothing; nor does a group of one."""
    assert all(ranks(unfilled_head))


def unfilled_head() -> bool:
    x, w, y = torch.randn(5, 8), torch.zeros(16, 8), torch.arange(5)
    torch.manual_seed(0)
    dist.broadcast(x, 0)
    size = dist.get_world_size()
    loss = sk.linear_cross_entropy(x, w, y, group=dist.group.WORLD)
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    whole_head = torch.randn(16, 8)
    one = sk.linear_cross_entropy(x, whole_head, y, group=alone)
    return abs(float(loss) - math.log(16 * size)) < 1e-5 and torch.equal(one, sk.linear_cross_entropy(x, whole_head, y))
