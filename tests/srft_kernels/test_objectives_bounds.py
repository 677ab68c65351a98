"""What every version of PyTorch, and both backends, must agree on: derivatives at bounds and ties, NaN, integers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.objectives.ratios import clipped, larger

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on NaN
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
N, H, V = 6, 8, 17


def gradient(objective, backend: str = "torch", passes: int | None = None, **columns) -> tuple[Tensor, Tensor]:
    """(loss, dx) with weights of 1, every log-prob being −log 17 exactly."""
    x = torch.zeros(N, H, requires_grad=True)
    w = (torch.arange(V * H) % 7 - 3.0).view(V, H)
    out = sk.linear_loss(x, w, torch.arange(N), objective, plan=sk.Plan(backend=backend, passes=passes),
                         token_weight=torch.ones(N), **columns)  # fmt: skip
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]


def test_a_clip_has_its_arguments_slope_at_either_bound():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan], requires_grad=True)
    value = clipped(x, 0.0, 1.0)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.tensor([0, 0, 0.5, 1, 1, math.nan]), equal_nan=True)
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 1]


def test_a_tie_has_the_first_ones_slope():
    a, b = (torch.tensor([1.0, 2.0, 3.0, math.nan], requires_grad=True) for _ in range(2))
    larger(a, b + torch.tensor([0, 1, -1, 0])).sum().backward()
    assert a.grad.tolist() == [1, 0, 1, 1] and b.grad.tolist() == [0, 1, 0, 0]


ON_THE_BOUND = {  # what r = 1 stands on, and the surrogate's slope there
    "clip_low=0": (sk.grpo(clip_low=0.0), -1.0),
    "clip_high=0": (sk.grpo(clip_high=0.0), -1.0),
    "both": (sk.grpo(clip_low=0.0, clip_high=0.0), -1.0),
    "dual_clip": (sk.grpo(dual_clip=1.0 + 2**-23), -1.0),
    "srft": (sk.srft_official(clip_low=0.0, clip_high=0.0, rollout_weight="constant", entropy_coef=0.0), -0.1),
}


@backends
@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("name", ON_THE_BOUND)
def test_fresh_data_on_a_bound_of_the_clip(name, passes, backend):
    """Every token stands on it: the gradient is that of the ratio itself, in the reference too."""
    objective, slope = ON_THE_BOUND[name]
    columns = {"advantages": torch.tensor([1.0, -1.0] * 3)}
    if isinstance(objective, sk.SRFT):
        columns |= {"is_demo": torch.zeros(N).bool(), "advantages": torch.ones(N)}
    _, found = gradient(objective, backend, passes, **columns)
    plain = sk.reinforce()
    _, expected = gradient(plain, "torch", None, advantages=-slope * columns["advantages"])
    torch.testing.assert_close(found, expected)
    x = torch.zeros(N, H, dtype=torch.float64, requires_grad=True)
    w = (torch.arange(V * H) % 7 - 3.0).view(V, H).double()
    loss = sk.reference.linear_loss(x, w, torch.arange(N), objective, token_weight=torch.ones(N), **columns).loss
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0].float(), expected)


@backends
@pytest.mark.parametrize("outside", ["truncate", "mask", "reject"])
def test_nan_of_a_sampler_reaches_the_loss_and_is_counted(outside, backend):
    sampler = torch.full((N,), -math.log(V))
    sampler[2] = math.nan
    objective = sk.reinforce(correction=sk.Correction(outside))
    for passes in (None, 2):
        loss, dx = gradient(objective, backend, passes, advantages=torch.ones(N), sampler_logprobs=sampler)
        assert loss.isnan() and torch.equal(dx.isnan().any(1), torch.arange(N) == 2)
    x = torch.zeros(N, H)
    told = sk.linear_loss(x, torch.zeros(V, H), torch.arange(N), objective, advantages=torch.ones(N),
                          sampler_logprobs=sampler).metrics  # fmt: skip
    assert told["correction_nan"] == pytest.approx(1 / N) and told["correction_outside"] == 0
    assert told["correction_weight"].isnan()


OF_NAN = {
    "advantages": sk.reinforce(),
    "advantages of srft": sk.SRFT(),
    "rewards": sk.srft_paper(),
    "rewards of advantages": sk.SRFT(positive="reward", rollout_signal="advantage"),
    "old_logprobs": sk.grpo(),
    "old_logprobs of cispo": sk.cispo(clip_low=0.2),
    "old_logprobs of sapo": sk.sapo(),
    "old_logprobs, dual": sk.grpo(dual_clip=3.0),
    "ref_logprobs": sk.grpo(kl_coef=0.1),
    "weight_entropy": sk.srft_paper(),
    "demo_logprobs": sk.luffy(demo_min=0.1, demo_max=0.5),
}


@backends
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OF_NAN)
def test_nan_of_an_annotation_is_not_hidden(name, sign, backend):
    """A loss that reads one is NaN, whatever clip, sign or comparison it goes through."""
    objective, column = OF_NAN[name], name.split()[0].strip(",")
    like = torch.full((N,), -math.log(V))
    columns = {"advantages": torch.full((N,), sign), "rewards": torch.full((N,), sign)}
    columns |= {n: like.clone() for n in ("old_logprobs", "ref_logprobs", "demo_logprobs", "weight_entropy")}
    columns["is_demo"] = torch.full((N,), column == "demo_logprobs")
    columns["advantages"] = columns["advantages"].abs() if column == "demo_logprobs" else columns["advantages"]
    columns = {n: c for n, c in columns.items() if n in objective.reads}
    columns[column][4] = math.nan
    loss, _ = gradient(objective, backend, **columns)
    assert loss.isnan() or (name == "weight_entropy" and sign < 0)  # negatives are not weighed by it
    columns["token_weight"] = torch.ones(N)
    demonstrations = {**columns, "is_demo": torch.ones(N).bool()}
    if column == "rewards":  # which mean nothing there
        weight = demonstrations.pop("token_weight")
        assert sk.linear_loss(torch.zeros(N, H), torch.zeros(V, H), torch.arange(N), objective, token_weight=weight,
                              **demonstrations).loss.isfinite()  # fmt: skip


INTEGERS = {
    "advantages": sk.reinforce(),
    "advantages of grpo": sk.grpo(dual_clip=3.0),
    "advantages of srft": sk.srft_official(),
    "rewards": sk.srft_paper(),
    "ref_logprobs": sk.grpo(kl_coef=0.1),
    "old_logprobs": sk.grpo(),
    "sampler_logprobs": sk.reinforce(correction=sk.Correction(high=9.0)),
    "weight_entropy": sk.srft_paper(),
    "is_demo": sk.srft_paper(),
    "demo_logprobs": sk.luffy(),
}


@backends
@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int64])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_the_numbers_that_they_are(name, kind, backend):
    """−A of a byte is none."""
    objective, column = INTEGERS[name], name.split()[0]
    whole = torch.tensor([0, 1, 1, 2, 0, 1]) if column != "is_demo" else torch.tensor([0, 1, 1, 0, 0, 1])
    whole = whole if kind == torch.uint8 or "logprobs" not in column else -whole
    columns = {"advantages": torch.ones(N), "rewards": torch.ones(N), "is_demo": torch.arange(N) % 2 > 0}
    columns |= {n: -torch.ones(N) for n in ("ref_logprobs", "old_logprobs", "sampler_logprobs", "demo_logprobs")}
    columns = {n: c for n, c in columns.items() if n in objective.requires(()) or n == column}
    for passes in (None, 2):
        found = gradient(objective, backend, passes, **{**columns, column: whole.to(kind)})
        expected = gradient(objective, backend, passes, **{**columns, column: whole.float()})
        for own, other in zip(found, expected):
            assert torch.equal(own, other)
    x, w = torch.zeros(N, H, dtype=torch.float64), torch.zeros(V, H, dtype=torch.float64)
    of_reference = [
        sk.reference.linear_loss(
            x, w, torch.arange(N), objective, token_weight=weight, **{**columns, column: given}
        ).loss
        for weight, given in ((torch.ones(N).to(kind), whole.to(kind)), (torch.ones(N), whole.float()))
    ]
    assert of_reference[0] == of_reference[1]


UNREAD = {  # where a NaN means nothing: the objective, and what of the tokens it stands on
    "rewards decide": (sk.srft_paper(), {"advantages": math.nan, "is_demo": False}),
    "no sft term": (sk.luffy(), {"weight_entropy": math.nan, "is_demo": True, "demo_logprobs": -1.0}),
    "nothing to gain": (sk.grpo(), {"old_logprobs": math.nan, "advantages": 0.0}),
    "nothing to gain, cispo": (sk.cispo(clip_low=0.2), {"old_logprobs": math.nan, "advantages": 0.0}),
    "nothing to gain, sapo": (sk.sapo(), {"old_logprobs": math.nan, "advantages": 0.0}),
    "nothing to gain, shaped": (sk.grpo(ratio_shaping=0.1), {"old_logprobs": math.nan, "advantages": 0.0}),
    "nothing to gain, luffy": (sk.luffy(), {"old_logprobs": math.nan, "advantages": 0.0, "is_demo": False}),
}
EVERY_PLAN = [("torch", None, None), ("torch", 2, None), ("torch", None, False), ("triton", None, None),
              ("triton", None, False), ("triton", 2, False)]  # fmt: skip


def everywhere(objective, token: dict) -> list[tuple[Tensor, ...]]:
    """(loss, dx, dW) under every plan and by the reference, where token 2 has those annotations."""
    like = torch.full((N,), -math.log(V))
    columns = {"advantages": torch.linspace(-1, 1, N), "rewards": torch.arange(N) % 2.0, "is_demo": torch.arange(N) > 3}
    columns |= {n: like.clone() for n in ("old_logprobs", "demo_logprobs", "weight_entropy", "sampler_logprobs")}
    for name, value in token.items():
        columns[name][2] = value
    columns = {name: c for name, c in columns.items() if name in objective.requires(()) or name in token}
    found = []
    for backend, passes, compact in [*EVERY_PLAN, ("reference", None, None)]:
        x, w = torch.zeros(N, H, requires_grad=True), (torch.arange(V * H) % 7 - 3.0).view(V, H).requires_grad_()
        given = {"token_weight": torch.ones(N), **columns}
        if backend == "reference":
            out = sk.reference.linear_loss(x, w, torch.arange(N), objective, **given)
        else:
            plan = sk.Plan(backend=backend, passes=passes, compact=compact)
            out = sk.linear_loss(x, w, torch.arange(N), objective, plan=plan, **given)
        found.append((out.loss.detach(), *torch.autograd.grad(out.loss, (x, w))))
    return found


@pytest.mark.parametrize("name", UNREAD)
def test_nan_where_nothing_reads_it(name):
    found = everywhere(*UNREAD[name])
    for loss, dx, dw in found:
        assert loss.isfinite() and dx.isfinite().all() and dw.isfinite().all()
        torch.testing.assert_close(dx, found[-1][1])


@pytest.mark.parametrize(
    ("objective", "token"),
    [
        (sk.grpo(correction=sk.Correction()), {"sampler_logprobs": math.nan, "advantages": 1.0, "old_logprobs": -9.0}),
        (sk.SRFT(negative_coef=0.0), {"advantages": math.nan, "is_demo": False}),
        (sk.srft_paper(negative_coef=0.0), {"rewards": math.nan, "is_demo": False}),
        (sk.reinforce(), {"advantages": math.nan}),
        (sk.grpo(), {"old_logprobs": math.nan, "advantages": -1.0}),
    ],
)
def test_nan_has_the_same_consequences_under_every_plan(objective, token):
    found = everywhere(objective, token)
    assert all(loss.isnan() for loss, _, _ in found)
    places = [dx.isnan().any(1).tolist() for _, dx, _ in found]
    assert all(place == places[-1] for place in places), places
