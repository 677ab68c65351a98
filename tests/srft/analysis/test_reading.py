"""Against full logits in fp64, of models that differ in one row of the head."""

import torch

from srft.analysis.reading import divergence, ranks, read
from tests.srft.analysis.conftest import ROW, logprobs_of


def test_what_is_read_of_each_token_is_what_full_logits_say(pair, sequences):
    for loaded in pair:
        reading, expected = read(loaded, sequences, 16), logprobs_of(loaded, sequences)
        target = torch.tensor([token for each in sequences for token in each.completion])
        assert torch.equal(reading.target, target) and loaded.model.training
        torch.testing.assert_close(
            reading.logprobs.double(), expected.gather(1, target[:, None])[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(reading.entropy.double(), -(expected.exp() * expected).sum(1), atol=1e-5, rtol=0)
        assert torch.equal(reading.likeliest, expected.argmax(1))
        above = (expected > expected.gather(1, target[:, None])).sum(1)
        assert torch.equal(ranks(reading, target), above)


def test_divergences_are_those_of_full_distributions(pair, sequences):
    base, other = (read(loaded, sequences, 16) for loaded in pair)
    p, q = (logprobs_of(loaded, sequences) for loaded in pair)
    middle = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    kl = (p.exp() * (p - q)).sum(1)
    js = ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2
    torch.testing.assert_close(divergence("forward_kl", base, other).double(), kl, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(divergence("jensen_shannon", base, other).double(), js, atol=1e-6, rtol=1e-3)
    assert kl.median() > 1e-5, "the models differ, or nothing is tested"
    # the other way round it is another number: base and model must not be swapped
    reverse = (q.exp() * (q - p)).sum(1)
    assert (kl - reverse).abs().max() > 1e-5
    torch.testing.assert_close(divergence("forward_kl", other, base).double(), reverse, atol=1e-6, rtol=1e-3)


def test_of_tokens_other_than_the_row_the_log_probs_move_by_the_same(pair, sequences):
    """Only the normalisation has changed for them: log p' − log p = log Z − log Z' at each position."""
    base, other = (read(loaded, sequences, 16) for loaded in pair)
    change = other.logprobs - base.logprobs
    of_row = base.target == ROW
    likelier = (other.hidden.sum(1) * 0.3) > 0  # the row's logit has grown by 0.3 Σ h
    assert of_row.sum() == 3 and torch.equal(change[of_row] > 0, likelier[of_row])
    assert torch.equal(change[~of_row] < 0, likelier[~of_row])


def test_a_model_against_itself_is_exactly_zero(pair, sequences):
    reading = read(pair[0], sequences, 16)
    for kind in ("forward_kl", "jensen_shannon"):
        assert not divergence(kind, reading, reading).any()
    assert not ranks(reading, reading.likeliest).any()


def test_part_of_a_reading(pair, sequences):
    reading = read(pair[0], sequences, 16)
    where = reading.target == ROW
    part = reading.of(where)
    assert len(part.hidden) == len(part.logprobs) == 3 and set(part.target.tolist()) == {ROW}
