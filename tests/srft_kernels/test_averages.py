"""Token weights: which average each one is, with padding, empty sequences and nothing at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import srft_kernels as sk

MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 0]]).bool()
IDS = torch.tensor([[7, 7, 7, 3, 3], [5, 5, 9, 9, 9]])
LOSS = torch.arange(10.0).reshape(2, 5) ** 2


def weigh(weight):
    assert weight.dtype == torch.float32 and weight.shape == MASK.shape and (weight[~MASK] == 0).all()
    return (weight * LOSS).sum()


def sequence_losses():
    return [LOSS[MASK & (i == IDS)] for i in (7, 3, 5, 9)]


def test_token_mean():
    torch.testing.assert_close(weigh(sk.token_mean(MASK)), LOSS[MASK].mean())


def test_sequence_mean():
    torch.testing.assert_close(
        weigh(sk.sequence_mean(MASK, IDS)), torch.stack([s.mean() for s in sequence_losses()]).mean()
    )


def test_constant_length():
    total = sum(s.sum() for s in sequence_losses())
    torch.testing.assert_close(weigh(sk.constant_length(MASK, IDS, 16)), total / (4 * 16))


def test_sequences_without_live_tokens_do_not_count():
    mask = MASK & (IDS != 9)
    weight = sk.sequence_mean(mask, IDS)
    expected = torch.stack([s.mean() for s in sequence_losses()[:3]]).mean()
    torch.testing.assert_close((weight * LOSS).sum(), expected)
    assert sk.constant_length(mask, IDS, 1)[mask].unique().tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize("mask", [torch.zeros(2, 3).bool(), torch.zeros(0).bool()])
def test_nothing_live(mask):
    ids = torch.zeros(mask.shape, dtype=torch.long)
    for weight in (sk.token_mean(mask), sk.sequence_mean(mask, ids), sk.constant_length(mask, ids, 4)):
        assert weight.shape == mask.shape and (weight == 0).all()


def test_ids_may_be_anything():
    """Not contiguous, negative for padding, any integer type."""
    ids = torch.where(MASK, IDS * 10**6, -1)
    torch.testing.assert_close(sk.sequence_mean(MASK, ids.int()), sk.sequence_mean(MASK, IDS))


def test_a_step_does_not_depend_on_its_cut_into_microbatches():
    x, w, y = (
        torch.randn(2, 5, 4, dtype=torch.float64),
        torch.randn(7, 4, dtype=torch.float64),
        torch.randint(7, (2, 5)),
    )
    y[~MASK] = -100
    for weight in (sk.token_mean(MASK), sk.sequence_mean(MASK, IDS), sk.constant_length(MASK, IDS, 8)):
        gradients = []
        for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
            head = w.clone().requires_grad_()
            for part in parts:
                sk.linear_loss(x[part], head, y[part], sk.sft(), token_weight=weight[part]).loss.backward()
            gradients.append(head.grad)
        torch.testing.assert_close(*gradients)


def test_counts_past_what_fp32_holds():
    """2²⁴ + 2²² tokens of one sequence: a count in fp32 stops at 2²⁴."""
    n = 2**24 + 2**22
    mask, ids = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int32)
    for weight in (sk.token_mean(mask), sk.sequence_mean(mask, ids), sk.constant_length(mask, ids, n)):
        assert float(weight.double().sum()) == pytest.approx(1, rel=1e-7)


def test_sequences_that_are_masked_out_count_where_asked():
    """As in TRL and Liger, whose mean is over the batch."""
    mask = MASK & (IDS != 9)
    live = [LOSS[mask & (i == IDS)] for i in (7, 3, 5)]
    for count in (4, np.int64(5)):
        assert weigh_of(sk.sequence_mean(mask, IDS, sequences=count)) == pytest.approx(
            float(sum(s.mean() for s in live) / count)
        )
        assert weigh_of(sk.constant_length(mask, IDS, 16, sequences=count)) == pytest.approx(
            float(sum(s.sum() for s in live) / (16 * count))
        )
    torch.testing.assert_close(sk.sequence_mean(mask, IDS, sequences=3), sk.sequence_mean(mask, IDS))


def weigh_of(weight):
    return float((weight * LOSS).sum())


def test_microbatches_get_their_weights_one_by_one():
    """With the count of the whole step they sum to its gradient."""
    whole = sk.sequence_mean(MASK, IDS)
    parts = [sk.sequence_mean(MASK[i : i + 1], IDS[i : i + 1], sequences=4) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sk.token_mean(MASK.float()), TypeError, "mask must be boolean, found torch.float32; write mask > 0"),
        (lambda: sk.token_mean(MASK.tolist()), TypeError, "mask must be a tensor, found list"),
        (
            lambda: sk.sequence_mean(MASK, IDS.bfloat16()),
            TypeError,
            "sequence_ids must hold integers, found torch.bflo",
        ),
        (lambda: sk.sequence_mean(MASK, IDS.bool()), TypeError, "sequence_ids must hold integers, found torch.bool"),
        (lambda: sk.sequence_mean(MASK, IDS[:1]), ValueError, r"sequence_ids must be shaped like mask \(2, 5\), found"),
        (lambda: sk.sequence_mean(MASK, IDS.tolist()), TypeError, "sequence_ids must be a tensor shaped like mask"),
        (lambda: sk.sequence_mean(MASK, IDS.to("meta")), ValueError, "sequence_ids is on meta but mask is on cpu"),
        (lambda: sk.sequence_mean(MASK, IDS, sequences=3), ValueError, "sequences=3, but 4 have a live token"),
        (lambda: sk.sequence_mean(MASK, IDS, sequences=0), ValueError, "sequences must be a number .* ≥ 1, found 0"),
        (lambda: sk.sequence_mean(MASK, IDS, sequences=4.0), ValueError, "sequences must be .*, found 4.0"),
        (lambda: sk.sequence_mean(MASK, IDS, sequences=True), ValueError, "sequences must be .*, found True"),
        (lambda: sk.constant_length(MASK, IDS, 0), ValueError, "length must be a positive number of tokens, found 0"),
        (lambda: sk.constant_length(MASK, IDS, math.nan), ValueError, "length must be a positive number .*, found nan"),
        (
            lambda: sk.constant_length(MASK, IDS, torch.tensor(3)),
            ValueError,
            "length must be a positive .*found tensor",
        ),
        (lambda: switch(rewards=torch.full((2, 5), math.nan)), ValueError, "rewards are NaN at 4 tokens of rollouts"),
        (lambda: switch(prompt_ids=IDS.float()), TypeError, "prompt_ids must hold integers, found torch.float32"),
        (lambda: switch(sequence_ids=IDS.half()), TypeError, "sequence_ids must hold integers, found torch.float16"),
        (lambda: switch(rewards=None), TypeError, "rewards must be a tensor shaped like is_demo"),
        (lambda: switch(mask=MASK.float()), TypeError, "mask must be boolean, found torch.float32"),
        (lambda: switch(mask=MASK[:1]), ValueError, r"mask must be shaped like is_demo \(2, 5\), found \(1, 5\)"),
        (lambda: switch(is_demo=[True]), TypeError, "is_demo must be a tensor, found list"),
        (lambda: switch(threshold="0.5"), ValueError, r"threshold must lie in \[0, 1\], .*, found '0.5'"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def switch(**changes):
    given = {"is_demo": IDS == 5, "rewards": MASK.float(), "prompt_ids": IDS // 4, "sequence_ids": IDS, "mask": MASK}
    return sk.hpt_switch(**{**given, **changes})


def test_integers_where_booleans_may_stand():
    for kind in (torch.uint8, torch.int64):
        torch.testing.assert_close(sk.sequence_mean(MASK.to(kind), IDS), sk.sequence_mean(MASK, IDS))
        assert torch.equal(switch(mask=MASK.to(kind), rewards=MASK.to(kind)), switch())


def test_in_a_graph_and_under_vmap():
    """Helpers without a gradient are plain PyTorch."""
    whole = torch.compile(switch, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(), switch())
    torch.testing.assert_close(torch.vmap(sk.token_mean)(MASK), torch.stack([sk.token_mean(row) for row in MASK]))
    correction, (old, sampler) = sk.Correction("mask"), (-LOSS / 9, -LOSS / 8)
    torch.testing.assert_close(torch.vmap(correction)(old, sampler), correction(old, sampler))
    assert not correction(old, sampler.clone().requires_grad_()).requires_grad
