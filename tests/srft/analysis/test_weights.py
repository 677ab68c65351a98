import copy

import torch

from srft.analysis.weights import changed, share
from tests.srft.conftest import tiny_model


def test_one_row_of_the_head_is_what_has_changed(pair):
    one, another = (each.model for each in pair)
    counts = changed(one, another)
    assert counts["lm_head"] == (32, 258 * 32)
    assert {name for name, (many, _) in counts.items() if many} == {"lm_head"}
    assert counts["model.layers.self_attn.q_proj"] == (0, 2 * 32 * 32), "both layers together"
    total = sum(each.numel() for each in one.parameters())
    assert share(counts) == 32 / total


def test_what_bf16_does_not_show_has_not_changed():
    one = tiny_model()
    another = copy.deepcopy(one)
    with torch.no_grad():
        another.model.layers[0].mlp.up_proj.weight *= 1 + 2**-20
    assert sum(many for many, _ in changed(one, another).values()) <= 64 * 32 * 2**-10  # next to a rounding boundary
    assert changed(one, tiny_model(num_hidden_layers=1)) is None
    assert sum(of for _, of in changed(one, one).values()) == sum(each.numel() for each in one.parameters())
