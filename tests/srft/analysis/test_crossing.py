import copy
import dataclasses
import math

import pytest
import torch

from srft.analysis.analyze import ROUNDING
from srft.analysis.crossing import CrossEngine, jensen_shannon
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
    engine = CrossEngine(one, copy.deepcopy(one), ROUNDING)
    engine.generate(PROMPTS, 2, **SETTINGS)
    assert engine.swapped == 0 and engine.tokens > 0


def test_what_is_swapped_past_the_end_of_a_completion_is_not_counted(apart):
    one, other = apart
    engine = CrossEngine(one, other, -1.0)
    ends = {engine.generate(PROMPTS, 2, **SETTINGS)[0][0].tokens[3]}
    engine.eos_ids, engine.tokens, engine.swapped = ends, 0, 0
    lengths = {len(each.tokens) for group in engine.generate(PROMPTS, 2, **SETTINGS) for each in group}
    assert min(lengths) < max(lengths) and engine.swapped == engine.tokens


def test_a_model_whose_state_is_no_cache_of_keys_and_values(apart):
    """Mamba reads the text anew for each token."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, state_size=4))
    mamba = dataclasses.replace(apart[0], model=mamba)
    alone = TransformersEngine(mamba).generate(PROMPTS[:1], 2, **SETTINGS)
    assert CrossEngine(apart[0], mamba, -1.0).generate(PROMPTS[:1], 2, **SETTINGS) == alone
    assert CrossEngine(mamba, apart[0], math.inf).generate(PROMPTS[:1], 2, **SETTINGS) == alone


def test_jensen_shannon_of_logits():
    one, another = (
        torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log(),
        torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]).log(),
    )
    expected = [0.0, math.log(2), 0.75 * math.log(4 / 3) + 0.0]
    expected[2] = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25) + math.log(1 / 0.75)) / 2
    assert jensen_shannon(one + 3, another - 2).tolist() == pytest.approx(expected, abs=1e-6)
