import pytest
import torch

import srft_kernels as sk
from srft.analysis.gradients import gradient, gradients
from srft.learn.packing import pack


def test_gradients_of_the_parts_are_those_of_the_specification(pair, sequences):
    """Plain autograd of full logits; and both parts together are the gradient of a whole step."""
    loaded, _ = pair
    expected = []
    for is_demo in (True, False):
        part = [each for each in sequences if each.is_demo == is_demo]
        loaded.model.zero_grad()
        rows = []
        for each in part:
            ids = torch.tensor([[*each.prompt, *each.completion]])
            rows.append(loaded.model.model(input_ids=ids).last_hidden_state[0, len(each.prompt) - 1 : -1])
        (whole,) = pack(part, token_budget=1000)
        order = whole.step_index.argsort()
        annotations = {name: values[order] for name, values in whole.annotations.items()}
        out = sk.reference.linear_loss(
            torch.cat(rows), loaded.model.lm_head.weight, whole.target[order], sk.srft_paper(), **annotations
        )
        out.loss.backward()
        expected.append([each.grad.clone() for each in loaded.model.parameters()])
        loaded.model.zero_grad()
    parts = []
    for is_demo, of_part in zip((True, False), expected):
        found = gradient(loaded, [each for each in sequences if each.is_demo == is_demo], 1.0, 16)
        for one, another in zip(found, of_part):
            torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-3)
        parts.append(torch.cat([each.flatten() for each in found]))
    together = torch.cat([each.flatten() for each in gradient(loaded, sequences, 1.0, 16)])
    torch.testing.assert_close(parts[0] + parts[1], together, atol=1e-5, rtol=1e-3)

    told = gradients(loaded, sequences, 1.0, 16)
    assert told.demonstrations == pytest.approx(float(parts[0].norm()), rel=1e-4)
    assert told.rollouts == pytest.approx(float(parts[1].norm()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(*parts, dim=0)
    assert told.cosine == pytest.approx(float(cosine), abs=1e-4)
    assert told.share == pytest.approx(told.demonstrations / (told.demonstrations + told.rollouts))
    assert all(each.grad is None for each in loaded.model.parameters())


def test_the_temperature_and_dropout_of_training(pair, sequences):
    loaded, _ = pair
    half = gradients(loaded, sequences, 0.5, 1000)
    assert half.rollouts > 1.5 * gradients(loaded, sequences, 1.0, 1000).rollouts
    for layer in loaded.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert gradients(loaded, sequences, 0.5, 1000) == half and loaded.model.training


def test_without_demonstrations_or_rollouts_there_is_no_cosine(pair, sequences):
    told = gradients(pair[0], sequences[1:], 1.0, 1000)
    assert told.demonstrations == 0 and told.share == 0 and told.cosine != told.cosine
    none = gradients(pair[0], [], 1.0, 1000)
    assert none.share != none.share
