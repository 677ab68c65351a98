import math

import pytest
import torch
from torch import nn

from srft.config import TrainConfig
from srft.optim import Optimizer, learning_rate


def train_config(**changes) -> TrainConfig:
    return TrainConfig(**{"warmup_steps": 0, "schedule": "constant", "max_grad_norm": 1e9, **changes})


def test_schedules():
    constant = train_config(lr=1.0, warmup_steps=4)
    assert [learning_rate(i, constant) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = train_config(lr=1.0, steps=4, schedule="linear")
    assert [learning_rate(i, linear) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = train_config(lr=1.0, steps=6, warmup_steps=2, schedule="cosine")
    assert [learning_rate(i, cosine) for i in range(6)] == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_fp32_weights_take_plain_adamw_steps():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, train_config(lr=0.01))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    for number in range(3):
        x = torch.randn(7, 5)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        optimizer.step(number)
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.grad is None


def test_steps_below_the_rounding_of_bf16_add_up():
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = Optimizer(model, train_config(lr=1e-4))
    for number in range(100):  # each step is 1e-4, while bf16 has nothing between 0.996 and 1
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(number)
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.weight.float(), torch.full((4, 4), 0.99), atol=0.004, rtol=0)
    torch.testing.assert_close(optimizer.masters[0], torch.full((4, 4), 0.99), atol=1e-4, rtol=0)


def test_gradients_of_bf16_weights_are_added_up_in_fp32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, train_config())
    for x in [1.0] + [1 / 512] * 512:  # in bf16, 1 + 1/512 is 1
        (model.weight * x).sum().backward()
    assert optimizer.masters[0].grad.item() == 2.0 and model.weight.grad is None


def test_gradients_are_clipped_and_their_norm_reported():
    model = nn.Linear(4, 1, bias=False)
    optimizer = Optimizer(model, train_config(max_grad_norm=0.5))
    seen = {}
    optimizer.adamw.step = lambda: seen.update(norm=model.weight.grad.norm().item())
    (model.weight * 3).sum().backward()
    assert optimizer.step(0)["grad_norm"] == pytest.approx(6.0)
    assert seen["norm"] == pytest.approx(0.5, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_left_out():
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, train_config())
    (model.weight * math.inf).sum().backward()
    assert optimizer.step(0)["skipped_updates"] == 1
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_weight_decay_is_for_matrices_only():
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    optimizer = Optimizer(model, train_config(lr=0.1, weight_decay=0.5))
    (model.weight.sum() * 0 + model.bias.sum() * 0).backward()
    optimizer.step(0)
    torch.testing.assert_close(model.weight, torch.full((2, 2), 0.95))
    assert torch.equal(model.bias, torch.ones(2))


def test_betas_and_eps_reach_adamw():
    optimizer = Optimizer(nn.Linear(2, 1), train_config(beta1=0.8, beta2=0.95, eps=1e-5))
    groups = optimizer.adamw.param_groups
    assert [(group["betas"], group["eps"]) for group in groups] == [((0.8, 0.95), 1e-5)] * 2
    default = Optimizer(nn.Linear(2, 1), train_config()).adamw.defaults
    assert (default["betas"], default["eps"]) == ((0.9, 0.999), 1e-8)
