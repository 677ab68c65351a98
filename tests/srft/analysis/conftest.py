import copy

import pytest
import torch

from srft.learn.packing import Sequence
from srft.model import LoadedModel
from tests.srft.conftest import loaded_model, tiny_model

ROW = 7  # of the head, in which the two models differ


@pytest.fixture
def pair() -> tuple[LoadedModel, LoadedModel]:
    """Two models that differ in one row of the head."""
    one = tiny_model(tie_word_embeddings=False)
    another = copy.deepcopy(one)
    with torch.no_grad():
        another.lm_head.weight[ROW] += 0.3
    return loaded_model(one), loaded_model(another)


@pytest.fixture
def sequences() -> list[Sequence]:
    """Of different lengths, which padding and sorting must not mix up."""
    return [
        Sequence([5, 6, 7], [ROW, 9, 10, 0], is_demo=True, reward=1.0, advantage=1.0),
        Sequence([11], [12, ROW, ROW, 13, 14, 15, 0], reward=1.0, advantage=0.5),
        Sequence([16, 17], [18, 0], reward=0.0, advantage=-1.5),
    ]


def logprobs_of(loaded, sequences):
    """(N, V) fp64 of each text's tokens, from the model's own logits, one text at a time."""
    rows = []
    model = loaded.model.double().eval()
    for each in sequences:
        ids = torch.tensor([[*each.prompt, *each.completion]])
        logits = model(input_ids=ids).logits[0, len(each.prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).detach())
    model.float().train()
    return torch.cat(rows)
