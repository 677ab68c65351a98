"""How the sequences of a step may stand together on this model: packed into one row, or each in a row of its own.

A backbone that does not follow the segments of a packed row (a recurrence, an attention of its own, positions counted
from the start, …) would silently mix sequences up, so it is tried out.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from srft.model.attention import Segment, Segments
from srft.model.head import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layers whose attention sees what its arguments say. Of others a trial of few tokens would not show that they choose.
LAYERS = {"full_attention", "sliding_attention"}
CHOICES = ("attention_chunk_size", "index_topk")


@dataclass(frozen=True)
class Rows:
    """packed: many sequences in a row; else one, and rows are padded.   shared: completions of a prompt may share it.

    apart: longer sequences, which have other rotary frequencies, never meet others.
    """

    packed: bool = False
    shared: bool = False
    apart: int = sys.maxsize


PADDED = Rows()


def rows_of(model: "PreTrainedModel") -> Rows:
    """Compares the hidden states of a few tokens in a packed row with those of sequences alone."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = [each for each in [rope, *rope.values()] if isinstance(each, dict)]
    lengths = [each.get("original_max_position_embeddings") for each in scaled if each.get("rope_type") == "longrope"]
    lengths += [getattr(config, "original_max_position_embeddings", None)] if lengths else []
    apart = min([each for each in lengths if each], default=sys.maxsize)
    known = set(getattr(config, "layer_types", None) or ()) <= LAYERS
    if not known or any(getattr(config, name, None) for name in CHOICES):
        return Rows(apart=apart)
    shared = followed(model, shared=True)
    return Rows(shared or followed(model, shared=False), shared, apart)


@torch.no_grad()
def followed(model: "PreTrainedModel", shared: bool) -> bool:
    config = model.config.get_text_config()
    ids = torch.tensor([7919 * i % config.vocab_size for i in range(64)], device=model.device)
    prompt, one, two, other = ids[:8], ids[8:28], ids[28:40], ids[40:]
    alone = [torch.cat([prompt, one]), torch.cat([prompt, two]), other]
    if shared:
        row = torch.cat([prompt, one, two, other])
        segments = [Segment(0, 8), Segment(8, 28, (0, 8)), Segment(28, 40, (0, 8)), Segment(40, 64)]
    else:
        row = torch.cat(alone)
        segments = [Segment(0, 28), Segment(28, 48), Segment(48, 72)]
    segments = Segments(segments)
    training = model.training
    model.eval()
    try:
        expected = torch.cat([hidden_states(model, each[None])[0] for each in alone])
        found = hidden_states(model, row[None], segments)[0]
        if shared:
            found = torch.cat([found[:28], found[:8], found[28:]])
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        same = error <= (0.05 if model.dtype.itemsize < 4 else 1e-3) and windows_arrive(config, segments)
    except Exception:  # whatever a backbone says about arguments that it does not know
        same = False
    model.train(training)
    return same


def windows_arrive(config: Any, segments: Segments) -> bool:
    """Does each layer tell its attention of the window that the config has for it? A trial is shorter than that."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return all(
        found == (window if types is None or types[layer] == "sliding_attention" else None)
        for layer, found in segments.windows.items()
    )
