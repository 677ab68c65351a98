"""The model that a loss with kl_coef keeps near. It is never trained."""

from dataclasses import replace
from typing import TYPE_CHECKING

from srft.config import ModelConfig
from srft.errors import UserError
from srft.model.load import LoadedModel, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_reference(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> LoadedModel:
    """model.reference, or model.path as it is before training: frozen, without dropout.

    tokenizer: that of the model that is trained.   Raises UserError as load_model does, and for other tokens than its.
    """
    config = replace(config, path=config.reference or config.path, gradient_checkpointing=False, dropout=False)
    option = "model.reference" if config.reference else "model.path"
    own, _ = load_tokenizer(config, option)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{option} {config.path!r}: its tokenizer is another one than that of the model that is trained, so their "
            "log-probs cannot be compared; take a model of one family"
        )
    loaded = load_model(config, option, own)
    loaded.model.requires_grad_(False).eval()
    return loaded
