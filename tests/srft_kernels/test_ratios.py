"""Weights for rollouts that another program sampled: as a function, as an option, and that the two are one."""

from __future__ import annotations

import math

import pytest
import torch

import srft_kernels as sk

from .counting import Recorder

N = 12
IDS = torch.tensor([7, 7, 3, 3, 3, 0, 0, 0, 0, 9, 9, 9])
MASK = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]).bool()


def logprobs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -2 + torch.randn(N, generator=generator, dtype=torch.float64)
    return old, old + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)


def by_hand(outside: str, level: str, low: float, high: float, masked: bool) -> list[float]:
    """The definition, token by token in plain Python."""
    old, sampler = logprobs()
    weights = []
    for i in range(N):
        if masked and not MASK[i]:
            weights.append(0.0)
            continue
        own = [j for j in range(N) if IDS[j] == IDS[i] and (MASK[j] or not masked)] if level != "token" else [i]
        total = sum(float(old[j] - sampler[j]) for j in own)
        ratio = math.exp(total / (len(own) if level == "geometric" else 1))
        if outside == "truncate":
            weights.append(min(max(ratio, low), high))
        else:
            weights.append((ratio if outside == "mask" else 1.0) if low <= ratio <= high else 0.0)
    return weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("outside", ["truncate", "mask", "reject"])
def test_weights(outside, level, masked):
    correction = sk.Correction(outside, level, low=0.8, high=1.25)
    old, sampler = logprobs()
    shape = (3, 4)  # any shape will do
    mask = MASK.view(shape) if masked else None
    found = correction(old.view(shape), sampler.view(shape), IDS.view(shape), mask)
    want = torch.tensor(by_hand(outside, level, 0.8, 1.25, masked), dtype=torch.float64)
    torch.testing.assert_close(found, want.view(shape))
    assert len(want[MASK].unique()) > 1 and not found.requires_grad


def test_ids_may_be_any_numbers_in_any_order():
    correction, (old, sampler) = sk.Correction("mask", "sequence", 0.5, 3.0), logprobs()
    order = torch.randperm(N)
    want = correction(old, sampler, IDS)[order]
    torch.testing.assert_close(correction(old[order], sampler[order], 10**12 - IDS[order]), want)


@pytest.mark.parametrize(
    "objective", [sk.grpo(), sk.gspo(), sk.cispo(), sk.sapo(), sk.dapo(dual_clip=3.0), sk.reinforce()]
)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_times_advantages_are_the_option_in_one_pass(objective, level):
    """Every surrogate is proportional to |A|, so a weight known before the step needs no option and no second pass."""
    correction, (old, sampler) = sk.Correction("mask", level, 0.8, 1.3), logprobs()
    x, w, y = torch.randn(N, 8).double(), torch.randn(20, 8).double(), torch.randint(20, (N,))
    columns = {"old_logprobs": old, "sequence_ids": IDS}
    advantages = torch.randn(N).double()
    results = []
    for run, more in (
        (
            type(objective)(**vars(objective) | {"correction": correction, "kl_coef": 0.1}),
            {"sampler_logprobs": sampler},
        ),
        (type(objective)(**vars(objective) | {"kl_coef": 0.1}), {}),
    ):
        a = advantages if more else advantages * correction(old, sampler, IDS)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        out = sk.linear_loss(*leaves, y, run, advantages=a, ref_logprobs=old - 0.1, **columns, **more)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for option, function in zip(*results):
        torch.testing.assert_close(option, function)


def test_rejected_tokens_cost_no_backward_product():
    old, sampler = logprobs()
    weights = sk.Correction("reject", low=0.9, high=1.1)(old, sampler)
    x, w, y = torch.randn(N, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.randint(20, (N,))
    kept = int((weights > 0).sum())
    assert 0 < kept < N
    with Recorder() as cost:
        sk.linear_loss(x, w, y, sk.grpo(), advantages=weights.float())
    assert cost.flops == 2 * 8 * 20 * (N + 2 * kept)


def test_rejection_by_the_ratio_that_a_clip_looks_at():
    """current=True with old_logprobs as the sampler's: tokens whose r left the bounds, now, say nothing."""
    x, w, y = torch.zeros(4, 8, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64), torch.arange(4)
    old = -math.log(16) - torch.tensor([0.0, 0.5, -0.5, 0.1], dtype=torch.float64)  # r = 1, e^0.5, e^−0.5, e^0.1
    objective = sk.PolicyGradient(correction=sk.Correction("reject", low=0.8, high=1.2, current=True))
    x.requires_grad_()
    out = sk.linear_loss(
        x, w, y, objective, advantages=-torch.ones(4).double(), old_logprobs=old, sampler_logprobs=old,
        token_weight=torch.ones(4).double(),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(1 + math.exp(0.1))
    assert out.metrics["correction_outside"] == 0.5 and out.metrics["correction_weight"] == 0.5


def test_what_nobody_sampled_is_never_corrected():
    """Demonstrations have no sampler: whatever is in its column there is not read."""
    old, sampler = logprobs()
    x, w, y = torch.randn(N, 8).double(), torch.randn(20, 8).double(), torch.randint(20, (N,))
    demo = IDS == 0
    columns = {"advantages": torch.randn(N).double(), "is_demo": demo, "old_logprobs": old, "sequence_ids": IDS}
    for level in ("token", "sequence", "geometric"):
        objective = sk.luffy(correction=sk.Correction(level=level))
        losses = []
        for garbage in (0.0, torch.nan, -torch.inf, torch.inf):
            given = torch.where(demo, garbage, sampler)
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            out = sk.linear_loss(*leaves, y, objective, sampler_logprobs=given, **columns)
            losses.append(torch.cat([out.loss[None], *(g.flatten() for g in torch.autograd.grad(out.loss, leaves))]))
            assert all(value.isfinite() for value in out.metrics.values())
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0])


@pytest.mark.parametrize(
    "objective",
    [
        sk.gspo(),
        sk.srft_hpt(),
        sk.srft_paper(level="batch"),
        sk.sapo(correction=sk.Correction(level="sequence")),
        sk.grpo(correction=sk.Correction("reject", "geometric", 0.9, 1.1)),
    ],
)
def test_tokens_that_are_not_live_take_no_part(objective):
    """Where an accelerator keeps ignored tokens in the batch, sequence and batch means leave them out."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(N, generator=generator, dtype=torch.float64)  # noqa: E731
    stats = sk.TokenStats(draw() - 3, draw().abs(), draw())
    columns = {"advantages": draw(), "rewards": draw(), "old_logprobs": stats.logprobs + draw() / 4,
               "sampler_logprobs": stats.logprobs + draw() / 4, "is_demo": IDS < 5, "sequence_ids": IDS}  # fmt: skip
    target = torch.zeros(N, dtype=torch.long)
    assert objective.reads_live
    found = objective(stats, sk.Tokens(target, **columns, live=MASK))[MASK]
    only = sk.Tokens(target[MASK], **{name: column[MASK] for name, column in columns.items()})
    torch.testing.assert_close(found, objective(stats.map(lambda field: field[MASK]), only))


def test_impossible_tokens():
    """Whatever the sampler or the trainer thought impossible: a weight that is a number, 0 where the trainer did."""
    never = torch.tensor([-1.0, -torch.inf, -torch.inf, -1.0])
    weights = sk.Correction(high=math.inf)(never, torch.tensor([-1e9, -1.0, -torch.inf, -torch.inf]))
    torch.testing.assert_close(weights, torch.tensor([math.exp(20), 0, 0, math.exp(20)]))


@pytest.mark.parametrize("scope, objective, given", [
    ("token", sk.grpo(correction=sk.Correction()), {"old_logprobs"}),
    ("sequence", sk.grpo(correction=sk.Correction(level="geometric")), {"old_logprobs"}),
    ("sequence", sk.sft(correction=sk.Correction(level="sequence")), set()),
    ("sequence", sk.gspo(), {"old_logprobs"}),
    ("token", sk.gspo(), set()),
    ("sequence", sk.srft_hpt(), set()),
    ("token", sk.srft_hpt(), {"weight_entropy"}),
    ("sequence", sk.srft_hpt(correction=sk.Correction(level="sequence")), {"weight_entropy"}),
    ("batch", sk.srft_paper(level="batch", surrogate="ppo", ratio_level="sequence"), {"old_logprobs"}),
    ("token", sk.srft_paper(level="batch", rollout_weight="constant", demo_weight="p"), set()),
])  # fmt: skip
def test_scope(scope, objective, given):
    """Which other tokens a token's loss depends on."""
    assert objective.scope(given) == scope


@pytest.mark.parametrize("make, error, message", [
    (lambda: sk.Correction("drop"), ValueError, r"Correction\(outside='drop'\): expected one of 'truncate', 'ma"),
    (lambda: sk.Correction(level="batch"), ValueError, r"level='batch'\): expected one of 'token', 'sequence', 'geo"),
    (lambda: sk.Correction(low=2.0, high=1.0), ValueError, r"low=2.0, high=1.0\): expected 0 ≤ low ≤ high and high"),
    (lambda: sk.Correction(high=math.nan), ValueError, r"Correction\(high=nan\): expected a number$"),
    (lambda: sk.Correction(high=None), ValueError, r"Correction\(high=None\): expected a number$"),
    (lambda: sk.Correction(low=-0.1), ValueError, r"low=-0.1, high=2.0\): expected 0 ≤ low"),
    (lambda: sk.grpo(correction=2.0), TypeError, r"PolicyGradient\(correction=2.0\): expected None or a Corr"),
    (lambda: sk.Correction(level="sequence")(*logprobs()), ValueError, r"\(level='sequence'\) needs sequence_ids"),
    (lambda: sk.Correction()(logprobs()[0], torch.zeros(3)), ValueError,
     r"sampler_logprobs must be shaped like logprobs \(12,\), found \(3,\)"),
    (lambda: sk.Correction()(*logprobs(), mask=MASK[:3]), ValueError, r"mask must be shaped like logprobs \(12,\)"),
])  # fmt: skip
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("outside", ["truncate", "mask", "reject"])
def test_nan_of_a_sampler_is_not_hidden(outside, level):
    """One rule for all: NaN wherever the ratio is; not where the token takes no part."""
    old, sampler = logprobs()
    sampler[5] = math.nan
    weights = sk.Correction(outside, level)(old, sampler, IDS, MASK)
    of_it = torch.arange(N) == 5 if level == "token" else (IDS[5] == IDS) & MASK
    assert torch.equal(weights.isnan(), of_it)
    sampler[5], sampler[3] = -1.0, math.nan  # outside of the mask
    assert sk.Correction(outside, level)(old, sampler, IDS, MASK).isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_log_probs_of_any_type(kind):
    """Computed in fp32 at least: in fp16 −1e30, which stands for −∞, is none."""
    old, sampler = (value.round().to(kind) for value in logprobs())
    found = sk.Correction(high=9.0)(old, sampler)
    assert found.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), sk.Correction(high=9.0)(old.double(), sampler.double()))


def test_sums_over_a_million_tokens():
    """One sequence whose log-ratios are all 1e-3, and cancel or not."""
    n = 2**20
    ids, sampler = torch.zeros(n, dtype=torch.int32), torch.zeros(n)
    mean = sk.Correction("truncate", "geometric", high=9.0)(torch.full((n,), 1e-3), sampler, ids)
    assert mean.unique().tolist() == [pytest.approx(math.exp(1e-3), rel=1e-6)]
    halves = torch.where(torch.arange(n) < n // 2, 1.0, -1.0) * 0.3 + 1e-6
    product = sk.Correction("truncate", "sequence", high=9.0)(halves, sampler, ids)
    assert product.unique().tolist() == [pytest.approx(math.exp(float(halves.double().sum())), rel=1e-5)]
