"""The model that is trained: loading it, and cutting it before its head."""

from srft.model.head import POSITIONS, head_of, hidden_states
from srft.model.load import EMBEDDED, LoadedModel, load_model, load_tokenizer

__all__ = ["EMBEDDED", "POSITIONS", "LoadedModel", "head_of", "hidden_states", "load_model", "load_tokenizer"]
