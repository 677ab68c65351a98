"""The model that is trained: loading it, and cutting it before its head."""

from srft.model.head import head_of, hidden_states
from srft.model.load import EMBEDDED, LoadedModel, load_model

__all__ = ["EMBEDDED", "LoadedModel", "head_of", "hidden_states", "load_model"]
