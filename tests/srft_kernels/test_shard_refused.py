"""Ranks that call a divided head differently, or wrongly: every rank gets the same message, and none waits."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import srft_kernels as sk
from srft_kernels import checks

from .cases import Problem, problem
from .test_exactness import everything
from .test_shard import part, plan_of


def alone(change: str, p: Problem) -> tuple[Problem, dict]:
    """What one rank gets that the others do not."""
    if change == "hidden states":
        p.input[3, 0] += 1
    changed = {
        "target's shape": {"target": p.target[1:]},
        "type": {"weight": p.weight.double()},
        "types": {"weight": p.weight.double(), "input": p.input.double()},
        "bias": {"bias": torch.zeros(len(p.weight))},
        "bias's shape": {"bias": torch.zeros(len(p.weight) + 1)},
        "empty part": {"weight": p.weight[:0]},
    }
    ones = torch.ones(len(p.target))
    options = {
        "weight": {"token_weight": ones},
        "weight's shape": {"token_weight": ones[1:]},
        "softcap": {"softcap": 5.0},
        "logit_scale": {"logit_scale": 2.0},
        "negative softcap": {"softcap": -1.0},
        "temperature": {"temperature": 2.0},
        "temperatures": {"temperature": ones},
        "live_tokens": {"live_tokens": len(ones)},
        "extras": {"extras": sk.Extras(rank=True)},
        "objective": {"objective": sk.sft(label_smoothing=0.1)},
        "advantages": {"objective": sk.grpo()},
        "function": {"objective": everything},
        "partial": {"partial_input_grad": True},
        "many annotations": {f"column_{'a' * 90}_{i}": ones for i in range(100)},
    }
    return replace(p, **changed.get(change, {})), options.get(change, {})


def refused(change: str) -> str:
    """The message that this rank gets."""
    p, rank, options = part(problem("random", ignored=0)), dist.get_rank(), {}
    if change == "tokens" and rank == 1:
        p = replace(p, input=p.input[1:], target=p.target[1:])
    if change == "targets" and rank == 1:
        p = replace(p, target=p.target.flip(0))
    if change == "gradient":
        p.input.requires_grad_(rank == 0)
    if rank == 1:
        p, options = alone(change, p)
    if change == "many annotations":
        options["objective"] = everything
    if change == "vocab_size":
        p.head["vocab_size"] = 1000
    if change == "float":
        p.head["vocab_size"] = 131.0
    if change == "group":
        p.head["group"] = dist.GroupMember.NON_GROUP_MEMBER
    if change == "token_group":
        options["token_group"] = "world"
    if change == "plan":
        options["plan"] = sk.Plan(chunk_rows=rank + 1)
    if change == "filter":
        options["plan"] = sk.Plan(filter=sk.Filter())
    if change == "batch_invariant":
        p.input.requires_grad_()
        options["plan"] = sk.Plan(batch_invariant=True)
    if change.startswith("whole head"):
        p = replace(problem(ignored=0), head={**p.head, "vocab_size": 131 if "vocab" in change else None})
    try:
        objective = options.pop("objective", sk.sft())
        sk.linear_loss(p.input, p.weight, p.target, objective, linear_bias=p.bias, **p.head, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokens", r"the ranks of group were called differently: the number of tokens is \[13, 12"),
        ("targets", "called differently: a checksum of the targets"),
        ("gradient", r"whether a gradient to input is wanted is \[1, 0"),
        ("plan", r"plan.chunk_rows is \[1, 2"),
        ("vocab_size", "vocab_size is 1000, but linear_weight has only 138 rows on all ranks of group"),
        ("float", "vocab_size must be a positive integer"),
        ("group", "group must be a process group .* that this process is in, found -100"),
        ("token_group", "token_group must be a process group"),
        ("filter", r"Plan\(filter=...\) cannot be kept with group="),
        ("batch_invariant", r"Plan\(batch_invariant=True\) with group= holds for scoring alone"),
        (
            "whole head",
            "every rank of group passes a linear_weight of 131 rows, and they are the same rows: with group=",
        ),
        (
            "whole head, vocab_size",
            "every rank .* of 131 rows, which is all of vocab_size=131: .* drop group= where each",
        ),
        ("partial", r"partial_input_grad is \[False, True"),
        # of one rank alone
        ("weight's shape", "token_weight must be shaped like target"),
        ("target's shape", "target must be shaped like input"),
        ("bias's shape", r"linear_bias must be \(V,\)"),
        ("type", "linear_weight is torch.float64 but input is torch.float32"),
        ("negative softcap", "softcap must be a positive number, found -1.0"),
        ("extras", "extras= with group= is not supported"),
        ("advantages", "needs the annotation advantages"),
        ("empty part", r"linear_weight must be \(V, H\) and not empty"),
        ("hidden states", "called differently: a checksum of the hidden states"),
        ("types", r"the type of products is \['torch.float32', 'torch.float64'"),
        ("bias", r"what is left out is \['linear_bias, class_weight, token_group', 'class_weight"),
        ("weight", r"what is given of each token is \['', 'token_weight'"),
        ("softcap", r"softcap is \[None, 5.0"),
        ("logit_scale", r"logit_scale is \[1.0, 2.0"),
        ("temperature", r"temperature is \[1.0, 2.0"),
        ("temperatures", r"temperature is \[1.0, None"),
        ("live_tokens", r"live_tokens is \[None, 13"),
        ("objective", r"objective is \['CrossEntropy\(\)', 'CrossEntropy\(label_smoothing=0.1\)'"),
        ("many annotations", r"what is given of each token is \['', 'column_a{90}_0.*… \([0-9a-f]{8}\)'"),
        ("function", r"objective is \['CrossEntropy\(\)', '<function everything>'"),
    ],
)
def test_mistakes_are_told_on_every_rank(ranks, change, message):
    for found in ranks(refused, change):
        assert re.search(message, found), found


def padding_alone() -> bool:
    """A rank that has nothing but padding, of as many rows as the vocabulary has, is no whole head."""
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    x, w, y = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator), torch.arange(5)
    mine = torch.cat([w, torch.zeros(2, 8)]) if rank == 0 else torch.full((32, 8), 7.0 + rank)
    mine[-1, 0] = rank
    loss = sk.linear_cross_entropy(x, mine, y, group=dist.group.WORLD, vocab_size=30)
    return abs(float(loss - sk.linear_cross_entropy(x, w, y))) < 1e-5


def test_a_rank_of_padding_alone(ranks):
    assert all(ranks(padding_alone))


def of_some_tokens(ignored: bool) -> str:
    """Loss or message where hidden states and token weights of the first tokens are other ones on each rank."""
    p, rank = part(problem("random", ignored=0)), dist.get_rank()
    weight = torch.ones(len(p.target))
    weight[:5] = rank
    if ignored:
        p.target[:5], p.input[:5] = -100, rank
    try:
        return f"{sk.linear_loss(p.input, p.weight, p.target, sk.sft(), token_weight=weight, **p.head).loss:.4f}"
    except ValueError as error:
        return str(error)


def test_what_is_given_of_ignored_tokens_may_differ(ranks):
    found = ranks(of_some_tokens, True)
    assert len(set(found)) == 1 and float(found[0]) > 0
    for message in ranks(of_some_tokens, False):
        assert "called differently: checksums of what is given of each token" in message


def heads_of_a_group() -> tuple[int, str, bool]:
    """As on a GPU: gathers of a second call; what a rank is told whose part alone changes; whether the group lives on
    when it is destroyed."""
    p, group = problem(ignored=0), dist.new_group()
    p, gathers, gather = part(p, group), [], dist.all_gather
    counted = lambda *args, **kwargs: gathers.append(1) or gather(*args, **kwargs)  # noqa: E731
    may_look, checks.may_look, dist.all_gather = checks.may_look, lambda tensor: False, counted
    try:
        for _ in range(2):
            gathers.clear()
            sk.linear_loss(p.input, p.weight, p.target, sk.sft(), plan=plan_of(1), **p.head)
        told = ""
        if dist.get_rank() == 1:  # the others make no call: it must not wait for them
            try:
                sk.linear_loss(p.input, p.weight[1:], p.target, sk.sft(), **p.head)
            except ValueError as error:
                told = str(error)
    finally:
        checks.may_look, dist.all_gather = may_look, gather
    alive = weakref.ref(group)
    dist.barrier()
    dist.destroy_process_group(group)
    del p, group
    gc.collect()
    return len(gathers), told, alive() is not None


def test_a_head_is_agreed_on_once_where_nobody_may_look(ranks):
    """And whether it is does not depend on one rank's part; a group that is destroyed is forgotten."""
    for rank, (gathers, told, alive) in enumerate(ranks(heads_of_a_group)):
        assert gathers == 3 and not alive  # one for each chunk
        assert ("pass vocab_size=, by which heads of a group are told apart" in told) == (rank == 1)
