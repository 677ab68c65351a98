"""The prompts of each step."""

import pytest

from srft.config import Config
from srft.data import Example, Problem
from srft.learn.objective import build_objective
from srft.learn.order import drawn
from srft.learn.stages import Stage


def stage(prompts: int, shown: int, *, before: int = 0, number: int = 1, **train) -> Stage:
    config = Config()
    for name, value in {"prompts_per_step": 4, "steps": 50, **train}.items():
        setattr(config.train, name, value)
    example = Example([{"role": "user", "content": "?"}], None, "1", "task")
    problems = [Problem(example, [n], [n] if n < shown else None) for n in range(prompts)]
    return Stage("", config, build_objective(config.loss), problems, number, before)


def numbers(stage: Stage, steps: range) -> list[int]:
    return [problem.prompt[0] for step in steps for problem in drawn(stage, step)]


def test_each_prompt_once_before_any_comes_again_and_in_another_order():
    found = numbers(stage(10, 10), range(1, 6))
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]
    assert numbers(stage(10, 10), range(3, 4)) == found[8:12]  # a step alone
    assert numbers(stage(10, 10, seed=1), range(1, 6)) != found


def test_a_stage_begins_an_order_of_its_own():
    first, second = stage(10, 10), stage(10, 10, before=5, number=2)
    assert numbers(second, range(6, 9)) != numbers(first, range(1, 4))
    assert sorted(numbers(second, range(6, 11))[:10]) == list(range(10))


def test_a_share_of_each_step_has_demonstrations():
    """3 of 100 have one, and 1 of 4 prompts of a step is to: each comes again when the others have been there."""
    found = stage(100, 3, demo_share=0.25)
    steps = [numbers(found, range(step, step + 1)) for step in range(1, 25)]
    assert all(sum(number < 3 for number in step) == 1 for step in steps)
    shown = [number for step in steps for number in step if number < 3]
    assert all(sorted(shown[start : start + 3]) == [0, 1, 2] for start in range(0, 24, 3))
    others = [number for step in steps for number in step if number >= 3]
    assert len(set(others)) == len(others) == 72
    assert numbers(stage(100, 3, demo_share=0.01), range(1, 2))[0] < 3  # one at least


@pytest.mark.parametrize("shown", [0, 10])
def test_where_all_or_none_have_one_the_share_changes_nothing(shown):
    assert numbers(stage(10, shown, demo_share=0.5), range(1, 6)) == numbers(stage(10, shown), range(1, 6))


def test_a_share_of_one_leaves_the_others_out():
    assert set(numbers(stage(100, 8, demo_share=1.0), range(1, 4))) == set(range(8))
