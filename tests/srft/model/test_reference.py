from dataclasses import replace

import pytest
import torch

from srft.config import ModelConfig
from srft.errors import UserError
from srft.model import load_model, load_reference
from tests.srft.conftest import byte_tokenizer, tiny_model


def test_it_is_the_model_before_training_frozen(tiny_dir):
    config = ModelConfig(path=str(tiny_dir), device="cpu", gradient_checkpointing=True, dropout=True)
    loaded = load_model(config)
    reference = load_reference(config, loaded)
    assert not reference.model.training and not any(p.requires_grad for p in reference.model.parameters())
    for ours, theirs in zip(loaded.model.parameters(), reference.model.parameters()):
        assert ours is not theirs and torch.equal(ours, theirs)


def test_another_model_may_be_named(tiny_dir, tmp_path):
    other = tiny_model(hidden_size=16)
    other.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tiny_dir), device="cpu", reference=str(tmp_path))
    loaded = load_model(config)
    assert load_reference(config, loaded).model.config.hidden_size == 16
    with pytest.raises(UserError, match=r"^model.reference '.*/nowhere': there is no such directory"):
        load_reference(replace(config, reference=str(tmp_path / "nowhere")), loaded)
    loaded.tokenizer.add_tokens(["another"])
    with pytest.raises(UserError, match=r"^model.reference .*its tokenizer is another one than that of the model"):
        load_reference(config, loaded)
