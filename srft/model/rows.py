"""How the sequences of a step may stand together on this model: packed into one row, or each in a row of its own.

A backbone that does not follow the segments of a packed row (a recurrence, an attention of its own, positions counted
from the start, …) would silently mix sequences up, so it is tried out.
"""

import contextlib
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srft.errors import first_line
from srft.model.attention import Segment, Segments, use_packed_attention
from srft.model.head import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attention that sees what its arguments say. A trial of few tokens would not show what others make of many.
LAYERS = {"full_attention", "sliding_attention"}
CHOICES = ("attention_chunk_size", "index_topk", "attn_temperature_tuning")
# Rotary frequencies that change for all of a row once one of its sequences is longer than this of the config
SCALED = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}


@dataclass(frozen=True)
class Rows:
    """packed: many sequences in a row; else one, and rows are padded.   shared: completions of a prompt may share it.

    apart: longer sequences, which have other rotary frequencies, never meet others.   reason: why not packed.
    """

    packed: bool = False
    shared: bool = False
    apart: int = sys.maxsize
    reason: str = field(default="", compare=False)

    def common(self, other: "Rows") -> "Rows":
        """How sequences may stand together that two models read."""
        shared = self.shared and other.shared
        return Rows(self.packed and other.packed, shared, min(self.apart, other.apart), self.reason or other.reason)


PADDED = Rows()


@torch.no_grad()
def try_rows(model: "PreTrainedModel") -> Rows:
    """Gives the model the attention of packed rows, where it then says of each sequence what it said before."""
    config = model.config.get_text_config()
    apart = frequencies_change(config)
    if reason := unknown(model, config):
        return Rows(apart=apart, reason=reason)
    training, own = model.training, model.config._attn_implementation
    model.eval()
    alone = [hidden_states(model, each[None])[0] for each in trial(model)[:3]]
    use_packed_attention(model)
    reason = strayed(model, alone, shared=True)
    shared = not reason
    if not shared:
        reason = strayed(model, alone, shared=False) and reason
    if reason and own != model.config._attn_implementation:
        model.set_attn_implementation(own)
    model.train(training)
    return Rows(not reason, shared, apart, reason)


def unknown(model: "PreTrainedModel", config: Any) -> str:
    """What a trial cannot be asked of, or would not show; "" where there is nothing of it."""
    attention = model.config._attn_implementation
    if attention != "sdpa" and "flash" not in attention:
        return f"its attention is {attention}"
    if strange := sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS):
        return f"its layers of {strange[0]}"
    if chosen := [name for name in CHOICES if getattr(config, name, None)]:
        return f"its {chosen[0]}"
    for kind in {type(module) for module in model.modules() if "attention" in type(module).__name__.lower()}:
        with contextlib.suppress(OSError, TypeError):  # no source
            if re.search(r"_attn_implementation\b[^\n]*[\"']sdpa[\"']", inspect.getsource(kind)):
                return "its attention asks for sdpa by name"
    return ""


def frequencies_change(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type") in SCALED]
    names = [(each, SCALED[each["rope_type"]]) for each in of_layers]
    return min([each.get(name) or getattr(config, name) for each, name in names], default=sys.maxsize)


def trial(model: "PreTrainedModel") -> list[Tensor]:
    """Ids of a prompt with a completion, the same prompt with another, another sequence, and ids to change some to."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([7919 * i % vocabulary for i in range(128)], device=model.device)
    return [ids[:28], torch.cat([ids[:8], ids[28:40]]), ids[40:64], ids[64:]]


def strayed(model: "PreTrainedModel", alone: list[Tensor], shared: bool) -> str:
    """What is wrong with the hidden states of a packed row; "" where nothing is.

    They have to be those of the sequences alone, up to rounding; and where the tokens of some change, those of the
    others may not, which is told apart from rounding in any type.
    """
    one, two, other, changed = trial(model)
    if shared:  # prompt, completion, completion, another sequence
        row, expected = torch.cat([one, two[8:], other]), torch.cat([alone[0], alone[1][8:], alone[2]])
        segments = Segments([Segment(0, 8), Segment(8, 28, (0, 8)), Segment(28, 40, (0, 8)), Segment(40, 64)])
        changes = [(8, 28), (28, 40)]
    else:
        row, expected = torch.cat([one, two, other]), torch.cat(alone)
        segments = Segments([Segment(0, 28), Segment(28, 48), Segment(48, 72)])
        changes = [(0, 28), (28, 48)]
    half = model.dtype.itemsize < 4
    try:
        if any(
            far(hidden_states(model, each[None])[0], states) > 1e-3 for each, states in zip((one, two, other), alone)
        ):
            return "its attention is not sdpa alone"
        found = hidden_states(model, row[None], segments)[0]
        if not windows_arrive(model.config.get_text_config(), segments):
            return "its attention is not told of a window"
        if far(found, expected) > (0.05 if half else 1e-3):
            return "in a packed row it says something else"
        for start, end in changes:
            anew = row.clone()
            anew[start:end] = changed[: end - start]
            after = hidden_states(model, anew[None], segments)[0]
            kept = [i for i in range(len(row)) if not start <= i < end]
            if farthest(after[kept], found[kept]) > (1e-3 if half else 1e-5):
                return "in a packed row its sequences see each other"
        return ""
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a backbone says about arguments that it does not know
        return first_line(problem)


def far(found: Tensor, expected: Tensor) -> float:
    """Relative."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def farthest(found: Tensor, expected: Tensor) -> float:  # (n, H)
    """Of any token, beside the usual size of one."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm(dim=1).max() / expected.norm(dim=1).mean())


def windows_arrive(config: Any, segments: Segments) -> bool:
    """Does each layer tell its attention of the window that the config has for it? A trial is shorter than that."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return all(
        found == (window if types is None or types[layer] == "sliding_attention" else None)
        for layer, found in segments.windows.items()
    )
