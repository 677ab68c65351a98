"""Tokens divided over ranks against one process: averages, losses, summed gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import srft_kernels as sk

from .cases import Problem, problem


def cut(total: int) -> slice:
    """This rank's tokens: uneven parts, of which the last is empty on 4 ranks."""
    places = [0, total // 2, total] if dist.get_world_size() == 2 else [0, total // 4, total // 2, total, total]
    return slice(places[dist.get_rank()], places[dist.get_rank() + 1])


def tokens() -> dict[str, Tensor]:
    """Sequences that lie on several ranks, with ids that are not contiguous."""
    n = torch.arange(24)
    return {"mask": n % 5 != 3, "sequence_ids": n // 5 * 7, "prompt_ids": n // 10, "is_demo": n // 5 == 1,
            "rewards": (n // 5 % 2).float()}  # fmt: skip


AVERAGES = {
    "token_mean": lambda t, **group: sk.token_mean(t["mask"], **group),
    "sequence_mean": lambda t, **group: sk.sequence_mean(t["mask"], t["sequence_ids"], **group),
    "constant_length": lambda t, **group: sk.constant_length(t["mask"], t["sequence_ids"], 11.0, **group),
    "hpt_switch": lambda t, **group: sk.hpt_switch(
        t["is_demo"], t["rewards"], t["prompt_ids"], t["sequence_ids"], 0.5, t["mask"], **group
    ),
}


def average(name: str) -> Tensor:
    mine = {key: column[cut(24)] for key, column in tokens().items()}
    return AVERAGES[name](mine, token_group=dist.group.WORLD)


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_those_of_one_process(ranks, name):
    assert torch.equal(torch.cat(ranks(average, name)), AVERAGES[name](tokens()))


def part(p: Problem, options: dict) -> dict[str, Tensor]:
    """This rank's loss and gradients."""
    mine = slice(None)
    if dist.is_initialized():
        mine, options = cut(len(p.target)), options | {"token_group": dist.group.WORLD}
    x, w = replace(p, input=p.input[mine]).leaves()
    function = sk.linear_cross_entropy if "weight" in options else sk.linear_loss
    out = function(x, w, p.target[mine], **({} if "weight" in options else {"objective": sk.sft()}), **options)
    loss = out if isinstance(out, Tensor) else out.loss
    loss.backward()
    return {"loss": loss.detach(), "dx": x.grad, "dW": w.grad}


@pytest.mark.parametrize("options", [{}, {"ignore_index": None}, {"weight": torch.arange(131) / 100}], ids=str)
def test_the_default_weight_counts_all_ranks(ranks, options):
    p = problem(tokens=24, ignored=0 if options else 0.3)
    one, parts = part(p, options), ranks(part, p, options)
    torch.testing.assert_close(sum(found["loss"] for found in parts), one["loss"])
    torch.testing.assert_close(sum(found["dW"] for found in parts), one["dW"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([found["dx"] for found in parts]), one["dx"], rtol=1e-5, atol=1e-7)


class Model(torch.nn.Module):
    """Embedding, one layer and a head, tied or not; the loss is called in its forward."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40, bias=False)
        self.layer = torch.nn.Linear(8, 8)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, target: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        hidden = self.layer(self.embedding(ids)).tanh()
        return sk.linear_cross_entropy(hidden, self.head.weight, target, token_group=group)


class Trunk(Model):
    """Whose loss is called after its forward."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids)).tanh()


def of_model(tied: bool, wrapper: str | None) -> dict[str, Tensor]:
    """Whole gradients by name, of tokens divided over the ranks where there is a wrapper."""
    torch.manual_seed(0)
    model, ids = Model(tied), torch.arange(24) * 7 % 40
    target = torch.where(torch.arange(24) % 3 == 0, -100, ids.roll(-1))
    if wrapper is None:
        model(ids, target, None).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}
    mine, count = cut(24), dist.get_world_size()
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
        (count * wrapped(ids[mine], target[mine], dist.group.WORLD)).backward()  # it averages
        return {name: weight.grad for name, weight in model.named_parameters()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if wrapper == "fsdp2, after the forward":
        torch.manual_seed(0)
        model = Trunk(tied)
    fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    if isinstance(model, Trunk):
        hidden = model(ids[mine])
        loss = sk.linear_cross_entropy(hidden, model.head.weight, target[mine], token_group=dist.group.WORLD)
    else:
        loss = model(ids[mine], target[mine], dist.group.WORLD)
    loss.backward()
    return {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, after the forward"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_called_in_the_forward_of_a_wrapped_module_or_on_its_hidden_states(ranks, tied, wrapper):
    """One gradient, reduced as any module's, tied or not."""
    one = of_model(tied, None)
    for found in ranks(of_model, tied, wrapper):
        assert found.keys() == one.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def of_pipeline() -> dict[str, Tensor]:
    """Gradients by name of this rank's layers, with microbatches passing through all ranks; the last has the head."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
    head = torch.nn.Linear(8, 40, bias=False)
    x, target = torch.randn(6, 5, 8), torch.randint(40, (6, 5)).index_fill(0, torch.tensor([2]), -100)
    live = (target >= 0).sum()  # of the whole step, which a stage sees only in parts

    def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
        weight = torch.full(target.shape, 1 / live)
        return sk.linear_loss(hidden, head.weight, target, sk.sft(), token_weight=weight).loss

    if not dist.is_initialized():
        loss_of(torch.nn.Sequential(*layers)(x), target).backward()
    else:
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        count, rank = dist.get_world_size(), dist.get_rank()
        mine = torch.nn.Sequential(*layers[4 * rank // count : 4 * (rank + 1) // count])
        stage = PipelineStage(mine, rank, count, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, n_microbatches=3, loss_fn=loss_of, scale_grads=False)
        schedule.step(*[x] * (rank == 0), target=target if rank == count - 1 else None)
    weights = {**dict(layers.named_parameters()), "head": head.weight}
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def test_the_last_stage_of_a_pipeline_alone_calls_the_loss(ranks):
    one, stages = of_pipeline(), ranks(of_pipeline)
    assert ["head" in stage for stage in stages] == [False] * (ranks.count - 1) + [True]
    found = {name: gradient for stage in stages for name, gradient in stage.items()}
    assert found.keys() == one.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def outside(function: str) -> str:
    """The message where the weight of a sharded module is passed as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Model(False), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    arguments = torch.zeros(3, 8), model.head.weight, torch.zeros(3).long()
    try:
        getattr(sk, function)(*arguments, **({"objective": sk.sft()} if function == "linear_loss" else {}))
    except TypeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("function", ["linear_loss", "linear_logprobs", "linear_cross_entropy"])
def test_a_sharded_weight_outside_of_its_module(ranks, function):
    for message in ranks(outside, function):
        assert "linear_weight is a DTensor" in message and "forward of the module that owns" in message


def nan_on_one_rank() -> str:
    given = {name: column[cut(24)] for name, column in tokens().items()}
    if dist.get_rank() == 0:
        given["rewards"] = given["rewards"] * torch.nan
    try:
        sk.hpt_switch(**given, token_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_rewards_that_are_nan_on_one_rank_are_told_on_all(ranks):
    assert all("rewards are NaN at" in found for found in ranks(nan_on_one_rank))
