import copy
import math

import pytest
import torch

from srft.analysis.crossing import ROUNDING, CrossEngine, jensen_shannon
from srft.rollout.transformers_engine import TransformersEngine

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18]]
SOME = 0.0015  # nats, by which some of the tokens differ
SETTINGS = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3, "batch_size": 8}


@pytest.fixture
def apart(pair):
    """Models whose layers differ too, so that the state that one keeps of a text is not the other's."""
    one, another = pair
    other = copy.deepcopy(another)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    return one, other


def test_with_nothing_swapped_a_model_writes_as_it_does_and_with_all_as_the_other(apart):
    """Token by token, whatever the lengths of prompts: the other's positions and padding are right."""
    one, other = apart
    alone = [TransformersEngine(each).generate(PROMPTS, 2, **SETTINGS) for each in apart]
    assert alone[0] != alone[1]
    never, always = CrossEngine(one, other, math.inf), CrossEngine(one, other, -1.0)
    always.threshold = -1.0
    assert never.generate(PROMPTS, 2, **SETTINGS) == alone[0]
    assert always.generate(PROMPTS, 2, **SETTINGS) == alone[1]
    count = sum(len(each.tokens) for group in alone[1] for each in group)
    assert never.swapped == 0 and always.swapped == always.tokens == count


def test_without_a_cache_it_is_the_same(apart):
    one, other = apart
    with_cache, without = (CrossEngine(one, other, SOME) for _ in range(2))
    without.other.cache_holds = False
    assert with_cache.generate(PROMPTS, 2, **SETTINGS) == without.generate(PROMPTS, 2, **SETTINGS)
    assert 0 < with_cache.swapped == without.swapped < with_cache.tokens


def test_a_model_is_never_swapped_with_itself(pair):
    one, _ = pair
    engine = CrossEngine(one, copy.deepcopy(one), 0.0)
    engine.generate(PROMPTS, 2, **SETTINGS)
    assert engine.swapped == 0 and engine.threshold == ROUNDING and engine.tokens > 0


def test_jensen_shannon_of_logits():
    one, another = (
        torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log(),
        torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]).log(),
    )
    expected = [0.0, math.log(2), 0.75 * math.log(4 / 3) + 0.0]
    expected[2] = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25) + math.log(1 / 0.75)) / 2
    assert jensen_shannon(one + 3, another - 2).tolist() == pytest.approx(expected, abs=1e-6)
