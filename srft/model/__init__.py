"""The model that is trained: loading it, and cutting it before its head."""

from srft.model.attention import Segment, Segments
from srft.model.head import POSITIONS, head_of, hidden_states
from srft.model.load import EMBEDDED, LoadedModel, load_merged, load_model, load_tokenizer, merged
from srft.model.reference import load_reference
from srft.model.rows import PADDED, Rows

__all__ = [
    "EMBEDDED",
    "PADDED",
    "POSITIONS",
    "LoadedModel",
    "Rows",
    "Segment",
    "Segments",
    "head_of",
    "hidden_states",
    "load_merged",
    "load_model",
    "load_reference",
    "load_tokenizer",
    "merged",
]
