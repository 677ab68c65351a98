"""The model that a loss with kl_coef keeps near. It is never trained."""

from dataclasses import replace

from srft.config import ModelConfig
from srft.errors import UserError
from srft.model.adapters import in_directory
from srft.model.load import LoadedModel, load_model, load_tokenizer


def load_reference(config: ModelConfig, loaded: LoadedModel) -> LoadedModel:
    """model.reference, or model.path as it is before training: frozen, without dropout.

    Where `loaded` is that with new adapters, it is `loaded` itself, to be asked without them; adapters that the
    reference was loaded with stay on.
    Raises UserError as load_model does, and for other tokens than those of `loaded`.
    """
    if loaded.adapters and config.reference in ("", config.path) and in_directory(config.path) is None:
        return loaded
    config = replace(config, path=config.reference or config.path, lora_rank=0, gradient_checkpointing=False)
    option = "model.reference" if config.reference else "model.path"
    own, _ = load_tokenizer(config, option)
    if own.get_vocab() != loaded.tokenizer.get_vocab():
        raise UserError(
            f"{option} {config.path!r}: its tokenizer is another one than that of the model that is trained, so their "
            "log-probs cannot be compared; take a model of one family"
        )
    reference = load_model(replace(config, dropout=False), option, own)
    reference.model.requires_grad_(False).eval()
    return replace(reference, adapters=None)
