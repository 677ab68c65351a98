import statistics

import pytest

from srft.learn.credit import group_advantages, switched
from srft.learn.packing import Sequence


def test_centred_and_divided_by_the_sample_deviation():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    advantages = group_advantages(rewards, std=True, eps=0.0)
    scale = statistics.stdev(rewards)
    assert advantages == pytest.approx([(r - 0.6) / scale for r in rewards])


def test_without_deviation_only_centred():
    assert group_advantages([1.0, 0.0, 0.5], std=False) == pytest.approx([0.5, -0.5, 0.0])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1e-8])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("std", [True, False])
def test_equal_rewards_give_exactly_zero(reward, count, std):
    # 0.1 + 0.1 + 0.1 is not 0.3: the mean must not leave a sign behind, and a sign is all that some objectives read
    assert group_advantages([reward] * count, std=std, eps=0.0) == [0.0] * count


def test_unscored_rewards_take_no_part():
    assert group_advantages([1.0, None, 0.0], std=False) == pytest.approx([0.5, 0.0, -0.5])
    assert group_advantages([None, None]) == [0.0, 0.0]
    assert group_advantages([None, 1.0]) == [0.0, 0.0]
    assert group_advantages([]) == []


@pytest.mark.parametrize(
    ("rewards", "threshold", "demo"),
    [
        ([1, 0, 0, 0], 0.0, False),
        ([0, 0, 0, 0], 0.0, True),
        ([1, 0, 0, 0], 0.25, True),
        ([1], 1.0, True),
        ([], 0.0, True),
    ],
)
def test_hpt_learns_from_rollouts_that_succeed_often_enough_else_from_the_demonstration(rewards, threshold, demo):
    rollouts = [Sequence([1], [2], False, float(reward)) for reward in rewards]
    chosen = switched([*rollouts, Sequence([1], [3], True, 1.0)], threshold)
    assert [sequence.is_demo for sequence in chosen] == ([True] if demo else [False] * len(rewards))
