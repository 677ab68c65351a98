import statistics

import pytest

from srft.data import Example, Problem
from srft.learn.credit import group_advantages, reward_metrics, scored, switched
from srft.learn.packing import Sequence
from srft.rewards import Scorer
from srft.rollout import Rollout


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


class Decoder:
    """A prompter that only decodes."""

    end_id = 0

    @staticmethod
    def decode(tokens):
        return "".join(map(chr, tokens))


def test_a_group_has_the_rewards_of_its_rollouts_and_of_its_demonstration():
    seen = []

    def reward(completions, finished, completion_ids, task):
        seen.extend(zip(completions, finished, completion_ids, task))
        return [{"score": float(len(each)), "first": float(each == "a")} for each in completions]

    a, b = (Example([{"role": "user", "content": "?"}], "demo" if name == "b" else None, None, name) for name in "ab")
    problems = [Problem(a, [1], None), Problem(b, [1], [9, 0])]
    rollouts = [[Rollout([97], True), Rollout([98, 98], False)], [Rollout([99] * 3, True), Rollout([100], True)]]
    groups = scored(Scorer("test", reward), Decoder, problems, rollouts)
    assert [(group.rewards, group.demo_reward) for group in groups] == [([1.0, 2.0], None), ([3.0, 1.0], 4.0)]
    assert seen == [
        ("a", True, [97], "a"),
        ("bb", False, [98, 98], "a"),
        ("ccc", True, [99, 99, 99], "b"),
        ("d", True, [100], "b"),
        ("demo", True, [9, 0], "b"),
    ]
    metrics = reward_metrics(groups)
    assert metrics["reward/first"] == 0.25 and metrics["reward_mean"] == 1.75 and metrics["reward_failed"] == 0.0


def test_rollouts_that_could_not_be_scored_are_counted_and_not_learned_from():
    def reward(completions):
        return [1.0 if each == "a" else 1 / 0 for each in completions]

    example = Example([{"role": "user", "content": "?"}], None, None, "t")
    groups = scored(
        Scorer("test", reward),
        Decoder,
        [Problem(example, [1], None)],
        [[Rollout([97], True)] * 2 + [Rollout([98], True)]],
    )
    assert groups[0].rewards == [1.0, 1.0, None]
    assert reward_metrics(groups)["reward_failed"] == 1.0 and reward_metrics(groups)["reward_mean"] == 1.0
