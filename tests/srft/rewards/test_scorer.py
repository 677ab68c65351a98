"""What a scorer makes of what its functions give."""

import sys

import numpy
import pytest
import torch

from srft.config import RewardConfig
from srft.errors import UserError
from srft.rewards import Scorer, build_reward
from tests.srft.rewards.conftest import FILE, example


def test_a_function_gets_prompts_completions_and_columns(write):
    body = "return [float(c == a) + n for p, c, a, n in zip(prompts, completions, columns['answer'], columns['level'])]"
    scorer = write(f"def reward(prompts, completions, **columns):\n    {body}\n")
    assert scorer([example("4", level=1), example("5", level=2)], ["4", "4"]) == [2.0, 2.0]


@pytest.mark.parametrize(
    "rewards",
    [numpy.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), (1, 0.5), [True, numpy.float32(0.5)], [1.0, torch.tensor(0.5)]],
)
def test_what_counts_as_a_list_of_rewards(rewards, monkeypatch):
    monkeypatch.setitem(sys.modules, "their", type("module", (), {"reward": staticmethod(lambda *_, **__: rewards)}))
    assert build_reward(RewardConfig("their:reward", workers=0), FILE)([example()] * 2, ["a", "b"]) == [1.0, 0.5]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [1.0]", "returned 1 rewards for 2 completions; return one number, or None, per completion"),
        ("return 1.0", "returned float, expected a list with one reward per completion"),
        ("return None", "returned NoneType, expected a list with one reward per completion"),
        ("return {'score': 1.0}", "returned dict, expected a list with one reward per completion"),
        ("return ['good', 1]", "reward 0 is 'good', expected a finite number or None"),
        ("return [1, float('nan')]", "reward 1 is nan, expected a finite number or None"),
        ("return [1, {'acc': 1}]", "reward 1 is a dict with 'acc', expected one with 'score' or 'reward'"),
        ("return [1, {'score': 'x'}]", "reward 1 is 'x', expected a finite number or None"),
        ("return columns['labels']", "the function raised KeyError: 'labels' (--debug shows where)"),
    ],
)
def test_a_function_that_misbehaves_is_named(write, body, expected, workers):
    scorer = write(f"def reward(prompts, completions, **columns):\n    {body}\n", workers=workers)
    with pytest.raises(UserError) as error:
        scorer([example(), example()], ["a", "b"])
    assert str(error.value) == f"reward.name {scorer.name!r}: {expected}"


def test_an_array_of_arrays_is_no_list_of_rewards():
    with pytest.raises(UserError, match="expected a finite number or None"):
        Scorer("test", lambda prompts, completions: torch.ones(2, 3))([example()] * 2, ["a", "b"])


SEVERAL = """
def length(completions):
    return [float(len(each)) for each in completions]
def sometimes(completions):
    return [None if each == "no" else 1.0 for each in completions]
def parts(completions):
    return [{"score": 2.0, "style": 0.5, "right": True, "note": "text", "nothing": None} for _ in completions]
def crash(completions):
    import os
    return [os._exit(1) if each == "crash" else 1.0 for each in completions]
"""


def test_several_functions_are_added_by_their_weights_and_each_has_a_metric(write):
    scorer = write(SEVERAL, ["length", "sometimes", "parts"], weights=[0.5, -1.0, 2.0])
    rewards = scorer([example()] * 2, ["yes", "no"])
    assert rewards == [0.5 * 3 - 1 + 4, 0.5 * 2 + 4]
    of_parts = {"reward/parts": 2.0, "reward/parts/style": 0.5, "reward/parts/right": 1.0}
    assert rewards.details == [
        {"reward/length": 3.0, "reward/sometimes": 1.0, **of_parts},
        {"reward/length": 2.0, **of_parts},
    ]


def test_without_weights_each_counts_once_and_what_none_scores_is_not_scored(write):
    assert write(SEVERAL, ["length", "sometimes"])([example()] * 2, ["yes", "no"]) == [4.0, 2.0]
    assert write(SEVERAL, "sometimes")([example()] * 2, ["yes", "no"]) == [1.0, None]
    assert write(SEVERAL, "length", weights=[0.5])([example()], ["yes"]) == [1.5]


def test_the_numbers_in_a_dict_become_metrics(write):
    rewards = write(SEVERAL, "parts", workers=1)([example()], ["a"])
    assert rewards == [2.0] and rewards.details == [{"reward/style": 0.5, "reward/right": 1.0}]


def test_where_one_of_several_functions_fails_the_sum_without_it_is_no_reward(write):
    rewards = write(SEVERAL, ["length", "crash"], workers=1)([example()] * 2, ["yes", "crash"])
    assert rewards == [4.0, None]
    assert rewards.details[1] == {"reward/length": 5.0, "reward_failed": 1.0}


def test_functions_of_one_name_are_told_apart_in_metrics():
    class Named:
        confined, needs_answer, single = False, False, False

        def __init__(self, name):
            self.name = name

    assert Scorer("", Named("a:f"), Named("b:f"), Named("a:g")).labels == ["a:f", "b:f", "g"]
