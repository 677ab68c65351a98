"""The loss among PyTorch's own means: copies, threads, checkpointing, accumulation."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import srft_kernels as sk

from .cases import Problem, problem

MODULES = {
    "cross_entropy": lambda: sk.LinearCrossEntropyLoss(torch.rand(131), label_smoothing=0.1),
    "srft": lambda: sk.SRFTLoss(sk.reinforce(), temperature=0.7),
}


def loss_of(module: torch.nn.Module, p: Problem) -> Tensor:
    options = {} if isinstance(module, sk.LinearCrossEntropyLoss) else {"advantages": torch.arange(13) / 3}
    out = module(p.input, p.weight, p.target, **options)
    return out if isinstance(out, Tensor) else out.loss


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_modules(name, copied):
    module, p = MODULES[name](), problem()
    assert torch.equal(loss_of(copied(module), p), loss_of(module, p))
    assert module.state_dict() == {} and list(module.parameters()) == []  # the model owns the head


def gradients(p: Problem, backend: str) -> tuple[Tensor, ...]:
    x, w = p.leaves()
    out = sk.linear_loss(x, w, p.target, sk.sft(), plan=sk.Plan(backend=backend, chunk_rows=5))
    out.loss.backward()
    return out.logprobs, x.grad, w.grad


def test_threads_do_not_disturb_each_other():
    problems = [problem(seed=seed) for seed in range(16)]
    alone = [gradients(p, "torch") for p in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: gradients(p, "torch"), problems))
    for found, expected in zip(together, alone):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_activation_checkpointing(passes, reentrant):
    p = problem()
    plan = sk.Plan(chunk_rows=5, passes=passes)

    def run(function):
        x, w = p.leaves()
        function(lambda x, w: sk.linear_loss((2 * x).tanh(), w, p.target, sk.sft(), plan=plan).loss, x, w).backward()
        return x.grad, w.grad

    plain = run(lambda loss, *tensors: loss(*tensors))
    checkpointed = run(lambda loss, *tensors: checkpoint(loss, *tensors, use_reentrant=reentrant))
    assert all(map(torch.equal, checkpointed, plain))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_accumulate(passes):
    """Microbatches with the step's token weights add up to the step."""
    p = problem(tokens=24)
    weight = sk.token_mean(p.live)

    def run(parts):
        x, w = p.leaves()
        for part in parts:
            plan = sk.Plan(chunk_rows=5, passes=passes)
            sk.linear_loss(x[part], w, p.target[part], sk.sft(), token_weight=weight[part], plan=plan).loss.backward()
        return x.grad, w.grad

    whole, parts = run([slice(None)]), run([slice(0, 7), slice(7, 24)])
    for found, expected in zip(parts, whole):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_function_transforms_are_refused(transform):
    p = problem()
    with pytest.raises(TypeError, match=r"input is under a transform of torch.func.*use torch.autograd.grad"):
        transform(lambda x: sk.linear_cross_entropy(x, p.weight, p.target))(p.input)
