import math

import numpy as np
import pytest
import torch

from srft.analysis.reading import Reading
from srft.analysis.shift import Shift, by_entropy, by_position, histogram, interval_over, shift, summary


def reading(probabilities: list[list[float]], target: list[int]) -> Reading:
    """A model whose distributions are those given: hidden states that pick a column of logits."""
    rows = torch.tensor(probabilities)
    logprobs = rows.log()
    head = {"linear_weight": logprobs.T.contiguous(), "linear_bias": None, "softcap": None, "logit_scale": 1.0}
    tokens = torch.tensor(target)
    of_target = logprobs.gather(1, tokens[:, None])[:, 0]
    entropy = -(rows * logprobs).sum(1)
    return Reading(torch.eye(len(rows)), head | {"vocab_size": None}, tokens, of_target, entropy, rows.argmax(1))


BEFORE = [[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]]
AFTER = [[0.5, 0.25, 0.125, 0.125], [0.1, 0.7, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]


def test_of_distributions_that_are_known_by_hand():
    found = shift(reading(BEFORE, [0, 1, 3]), reading(AFTER, [0, 1, 3]))
    kl = [0.0, 0.6 * math.log(7), 0.4 * math.log(4) + 0.3 * math.log(1.5) + 0.2 * math.log(2 / 3) - 0.1 * math.log(4)]
    assert found.kl == pytest.approx(kl, abs=1e-6)
    assert found.change == pytest.approx([0, math.log(7), math.log(4)], abs=1e-6)
    assert found.rank.tolist()[0] == 0 and found.rank[2] == 3  # what it prefers now was the least likely of four
    assert found.js[0] == 0 and 0 < found.js[1] < math.log(2)
    assert found.before[0] == pytest.approx(1.75 * math.log(2)) and found.after[0] == pytest.approx(found.before[0])

    means = summary(found, np.array([0, 0, 1]))
    assert means["tokens"] == 3 and means["kl"] == pytest.approx(sum(kl) / 3)
    assert means["changed"] == pytest.approx(2 / 3)
    assert means["unshifted"] == pytest.approx(1 / 3)
    assert means["marginal"] + means["shifted"] == pytest.approx(2 / 3) and means["shifted"] >= 1 / 3
    assert means["weight_down"] == pytest.approx(float(np.exp(-found.after).mean()))


def test_a_probability_that_has_doubled_or_halved_is_changed():
    change = np.log([2.0, 0.5, 1.9, 1.0])
    rank = np.array([0, 1, 2, 3])
    found = summary(Shift(*[np.zeros(4)] * 2, change, *[np.zeros(4)] * 2, rank), np.arange(4))
    assert found["changed"] == 0.5
    assert (found["unshifted"], found["marginal"], found["shifted"]) == (0.25, 0.5, 0.25)


def test_a_histogram_has_area_one_and_keeps_what_is_beyond_its_ends():
    points = histogram(np.array([-100.0, 0.0, 0.0, 9.0]))
    assert sum(y for _, y in points) * (points[1][0] - points[0][0]) == pytest.approx(1)
    assert points[0][1] == points[-1][1] > 0 and max(points, key=lambda each: each[1])[0] == pytest.approx(0.125)


def test_change_by_position_and_by_entropy():
    change, position = np.array([1.0, -2.0, 3.0, -5.0, 7.0]), np.array([0, 1, 2, 3, 4])
    assert by_position(change, position) == [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 7.0)]
    entropy = np.array([0.5, 0.1, 0.4, 0.2, 0.3])
    assert by_entropy(change, entropy, 2) == [
        (pytest.approx(0.2), pytest.approx(14 / 3)),
        (pytest.approx(0.45), pytest.approx(2.0)),
    ]


def test_an_interval_over_texts_covers_the_mean_of_all_tokens():
    """Texts of different lengths whose tokens belong together: 95 % of the intervals hold the truth, within chance."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        lengths = random.integers(1, 30, 40)
        text = np.repeat(np.arange(40), lengths)
        values = np.repeat(random.normal(1.0, 0.5, 40), lengths) + random.normal(0, 0.2, len(text))
        low, high = interval_over(values, text)
        held += low <= 1.0 <= high
    assert 0.91 <= held / 400 <= 0.98
    assert all(map(math.isnan, interval_over(np.ones(3), np.zeros(3, int))))
