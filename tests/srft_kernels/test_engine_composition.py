"""The loss among PyTorch's own means: autocast, inference mode, checkpointing, accumulation, threads, copies.

torch.compile has a file of its own; DDP, FSDP2 and pipelines are in test_averages_ranks.py, a divided head in
test_shard.py.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import srft_kernels as sk

from .cases import Problem, problem

MODULES = {
    "cross_entropy": lambda: sk.LinearCrossEntropyLoss(torch.rand(131), label_smoothing=0.1),
    "srft": lambda: sk.SRFTLoss(sk.reinforce(), temperature=0.7),
}


CALLS = {
    "linear_loss": lambda *call, **options: sk.linear_loss(*call, sk.sft(), **options).loss,
    "linear_logprobs": lambda *call, **options: torch.stack(sk.linear_logprobs(*call, **options).fields()),
    "linear_cross_entropy": sk.linear_cross_entropy,
}
both_passes = pytest.mark.parametrize("passes", [1, 2])


def plan_of(passes: int) -> sk.Plan:
    return sk.Plan(chunk_rows=5, passes=passes)


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


# Derivatives


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_function_transforms_are_refused(transform):
    p = problem()
    with pytest.raises(TypeError, match=r"input is under a transform of torch.func.*use torch.autograd.grad"):
        transform(lambda x: sk.linear_cross_entropy(x, p.weight, p.target))(p.input)


def test_functional_call_is_no_transform():
    model, p = torch.nn.Linear(16, 131, bias=False), problem()
    module = sk.LinearCrossEntropyLoss()
    model.forward = lambda x, target: module(x, model.weight, target)
    loss = torch.func.functional_call(model, {"weight": p.weight}, (p.input, p.target))
    assert torch.equal(loss, sk.linear_cross_entropy(p.input, p.weight, p.target))


@both_passes
@pytest.mark.parametrize("function", CALLS)
def test_second_derivatives_are_refused(function, passes):
    """Silence would be a penalty on gradients that does nothing."""
    p = problem()
    for wanted in (slice(2), slice(1), slice(1, 2)):
        tensors = [p.input, p.weight]
        tensors[wanted] = leaves = p.leaves()[wanted]
        value = CALLS[function](*tensors, p.target, plan=plan_of(passes)).sum()
        for gradient in torch.autograd.grad(value, leaves, create_graph=True):
            with pytest.raises(RuntimeError, match=r"differentiable once.*create_graph=True"):
                gradient.square().sum().backward()


@both_passes
def test_forward_mode_is_refused(passes):
    p = problem()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        x = torch.autograd.forward_ad.make_dual(p.input, p.input)
        sk.linear_loss(x, p.weight, p.target, sk.sft(), plan=plan_of(passes))


# Autocast: the rule of F.linear, with statistics and losses in fp32


def under(autocast: bool, p: Problem, function: str, passes: int, **options) -> tuple[Tensor, ...]:
    """(value, dx, dW), the forward under autocast or not, and the backward after it."""
    x, w = p.leaves()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = CALLS[function](x, w, p.target, plan=plan_of(passes), **options)
    value.sum().backward()
    return value.detach(), x.grad, w.grad


@both_passes
@pytest.mark.parametrize("function", CALLS)
def test_autocast_is_no_less_exact_than_that_of_a_linear_layer(function, passes):
    """Against fp64, and with results of the types that autocast promises. (On CPUs 16-bit operands are widened.)"""
    p = problem("gaussian", tokens=24, ignored=0)
    exact = under(False, replace(p, input=p.input.double(), weight=p.weight.double()), function, passes)
    x, w = p.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w).float()
        logp = z.log_softmax(-1)
        statistics = logp.gather(1, p.target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1)
        eager = torch.stack(statistics) if function == "linear_logprobs" else -statistics[0].mean()
    eager.sum().backward()
    for found, other, truth in zip(under(True, p, function, passes), (eager, x.grad, w.grad), exact):
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 2 * (other - truth).norm()


@both_passes
@pytest.mark.parametrize("function", CALLS)
def test_autocast_joins_types(function, passes):
    """Hidden states in bf16, from layers under autocast, and a head in fp32: gradients in the type of each."""
    p = problem("gaussian", tokens=24)
    mixed = replace(p, input=p.input.bfloat16())
    found, wide = (
        under(True, mixed, function, passes),
        under(False, replace(p, input=mixed.input.float()), function, passes),
    )
    assert [value.dtype for value in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(found[0], wide[0]) and torch.equal(found[1], wide[1].bfloat16())
    with pytest.raises(TypeError, match=r"cast one, or use torch\.autocast"):
        under(False, mixed, function, passes)


@both_passes
@pytest.mark.parametrize("function", CALLS)
def test_autocast_switched_off_inside_is_off(function, passes):
    p = problem("gaussian")
    plain = under(False, p, function, passes)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, under(False, p, function, passes), plain))


@both_passes
@pytest.mark.parametrize("function", CALLS)
def test_the_forward_decides_for_the_backward(function, passes):
    p = problem("gaussian")
    for inside in (False, True):  # the forward; the backward then is inside of the other
        expected = under(inside, p, function, passes)
        x, w = p.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            value = CALLS[function](x, w, p.target, plan=plan_of(passes))
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            value.sum().backward()
        assert all(map(torch.equal, (value.detach(), x.grad, w.grad), expected))


def test_autocast_leaves_fp64_alone():
    p = problem("gaussian")
    x, w = p.input.double(), p.weight.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert sk.linear_cross_entropy(x, w, p.target) == F.cross_entropy(F.linear(x, w), p.target)
        for mixed in ((p.input, w), (x, p.weight)):  # F.linear raises too
            with pytest.raises(TypeError, match=r"linear_weight is torch.float\d\d but input is torch.float\d\d"):
                sk.linear_cross_entropy(*mixed, p.target)


# No gradients wanted


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", CALLS)
def test_without_gradients_the_values_are_the_same(function, mode):
    p = problem()
    x, w = p.leaves()
    expected = CALLS[function](x, w, p.target)
    with mode():
        found = CALLS[function](x, w, p.target)
    assert torch.equal(found, expected) and not found.requires_grad and expected.requires_grad


@both_passes
def test_what_was_scored_in_inference_mode_serves_in_training(passes):
    """Old log-probs, rewards, targets, weights: whatever a rollout engine made under torch.inference_mode."""
    p = problem(ignored=0)  # one block of tokens that all count: nothing is copied

    def made() -> dict[str, Tensor]:
        logprobs = sk.linear_logprobs(p.input, p.weight, p.target).logprobs
        return {"target": p.target.clone(), "old_logprobs": logprobs, "ref_logprobs": logprobs - 0.1,
                "advantages": torch.arange(13) / 3 - 2, "token_weight": (torch.arange(13) + 1) / 90,
                "temperature": torch.arange(13) / 13 + 0.5}  # fmt: skip

    def gradients(columns: dict[str, Tensor], objective) -> tuple[Tensor, ...]:
        x, w = p.leaves()
        sk.linear_loss(x, w, objective=objective, plan=sk.Plan(passes=passes, block_rows=16), **columns).loss.backward()
        return x.grad, w.grad

    with torch.inference_mode():
        scored = made()
    assert scored["old_logprobs"].is_inference()

    def own(stats: sk.TokenStats, tokens: sk.Tokens) -> Tensor:
        return -(stats.logprobs - tokens.old_logprobs).exp() * tokens.advantages * tokens.target

    for objective in (sk.grpo(kl_coef=0.1), own):
        assert all(map(torch.equal, gradients(scored, objective), gradients(made(), objective)))


def test_hidden_states_of_inference_mode():
    """One pass needs nothing from a frozen backbone after the call; two passes keep it, and torch says what to do."""
    p = problem()
    with torch.inference_mode():
        x = p.input.clone()
    w, again = p.weight.clone().requires_grad_(), p.weight.clone().requires_grad_()
    sk.linear_loss(x, w, p.target, sk.sft(), plan=plan_of(1)).loss.backward()
    sk.linear_loss(p.input, again, p.target, sk.sft(), plan=plan_of(1)).loss.backward()
    assert torch.equal(w.grad, again.grad)
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward.*make a clone"):
        sk.linear_loss(x, w, p.target, sk.sft(), plan=plan_of(2)).loss.backward()
