import dataclasses
import math

from srft.analysis.texts import DEMONSTRATIONS, Set, Written, learnable, places_of, texts_of, write
from srft.config import Config
from srft.data import Example, Problem
from srft.learn.credit import Group
from srft.rollout import Rollout, build_engine


def problem(number: int, demonstration: list[int] | None) -> Problem:
    return Problem(Example([{"role": "user", "content": str(number)}], None, "1", "sums"), [number], demonstration)


def written(problems, token: int, rewards: list[list[float | None]]) -> Written:
    rollouts = [Rollout([token, 0], True), Rollout([token + 1], False)]
    return Written([Group(each, rollouts, own, 1.0) for each, own in zip(problems, rewards)])


def test_texts_and_where_their_tokens_stand():
    sets = [Set("task", [problem(1, [8, 9, 0]), problem(2, None)], None), Set("other", [problem(3, [4, 0])], None)]
    of_models = {
        ("base", "task"): written(sets[0].problems, 20, [[1.0, 0.0], [0.0, 0.0]]),
        ("base", "other"): written(sets[1].problems, 30, [[None, None]]),
        ("sft", "task"): written(sets[0].problems, 40, [[0.5, 1.0], [None, 1.0]]),
    }
    texts = texts_of(sets, of_models, 9)
    assert [(text.set, text.writer, text.tokens, text.reward) for text in texts] == [
        ("task", DEMONSTRATIONS, [8, 9, 0], None),
        ("task", "base", [20, 0], 1.0),
        ("task", "base", [20, 0], 0.0),
        ("task", "sft", [40, 0], 0.5),
        ("task", "sft", [40, 0], None),
        ("other", DEMONSTRATIONS, [4, 0], None),
        ("other", "base", [30, 0], None),
    ]
    places = places_of(texts)
    assert places.text.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert places.position.tolist() == [0, 1, 2] + [0, 1] * 6
    assert list(places.writer[:4]) == [DEMONSTRATIONS] * 3 + ["base"] and places.set[-1] == "other"
    assert texts[0].sequence.is_demo and not texts[1].sequence.is_demo

    assert [len(text.tokens) for text in texts_of(sets, of_models, 1)] == [1] * 7

    own = of_models["sft", "task"]
    assert own.rewards == [0.75, 1.0] and own.reward == 0.875  # what was not scored is left out
    assert math.isnan(of_models["base", "other"].reward)


def test_what_would_be_learned_from_has_the_advantages_of_a_step():
    problems = [problem(1, [8, 0])]
    sequences = learnable(written(problems, 20, [[1.0, 0.0]]), Config())
    assert [(each.is_demo, each.reward) for each in sequences] == [(False, 1.0), (False, 0.0), (True, 1.0)]
    assert sequences[0].advantage == sequences[2].advantage > 0 > sequences[1].advantage


def test_completions_without_a_scorer_have_no_reward(tiny):
    config = Config()
    config.analyze.samples, config.rollout.max_new_tokens = 2, 3
    config = dataclasses.replace(config)
    found = write(build_engine("transformers", tiny), Set("task", [problem(5, None)], None), None, config)
    assert [len(group.rollouts) for group in found.groups] == [2] and found.rewards == []
