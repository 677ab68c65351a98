"""Token weights: which average each one is, with padding, empty sequences and nothing at all."""

from __future__ import annotations

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


def test_mistakes():
    with pytest.raises(TypeError, match=r"mask must be boolean, found torch\.float32; write mask > 0"):
        sk.token_mean(MASK.float())
    with pytest.raises(ValueError, match=r"sequence_ids must be shaped like mask \(2, 5\), found \(5,\)"):
        sk.sequence_mean(MASK, IDS[0])
    with pytest.raises(ValueError, match="length must be a positive number of tokens, found 0"):
        sk.constant_length(MASK, IDS, 0)
