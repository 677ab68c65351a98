"""Attention over a packed row: sequences behind each other, none of which sees another, and no mask of the whole row.

use_packed_attention(model)                             # in place of transformers' sdpa, which it still is elsewhere
row = Segments([Segment(0, 5), Segment(5, 8, prompt=(0, 5)), Segment(8, 12, prompt=(0, 5)), Segment(12, 30)])
hidden = hidden_states(model, ids, row)                                             # ids (1, T)

On CUDA in half precision it is torch's varlen_attn, or scaled_dot_product_attention of a row that is one sequence;
elsewhere the latter, of a long segment at once, of others some queries at a time. So memory grows with T, not with its
square, as long as few share a long prompt, whose keys each of them has beside its own (learn/packing.py sees to that),
and without attention dropout, for which only a kernel that keeps the scores does on a CPU.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "srft"  # among transformers' implementations of attention
HALF = (torch.float16, torch.bfloat16)
ROWS = 128  # queries under one mask: of several small segments, or a part of one
LONG = 512  # tokens of a segment beyond which a kernel that takes no mask is the faster one


class Segment(NamedTuple):
    """Tokens start … end − 1 of a row. They see a segment before them (its start and end) whole, and then themselves,
    causally."""

    start: int
    end: int
    prompt: tuple[int, int] = (0, 0)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def before(self) -> int:
        """Tokens of its prompt: the position of its own first one."""
        return self.prompt[1] - self.prompt[0]

    @property
    def long(self) -> bool:
        """Without a mask: its prompt's queries are then computed once more, which a longer prompt makes dear. But masks
        are kept for the backward pass, and their size is that of a square."""
        return self.length > (4 * LONG if self.before > self.length else LONG)


@dataclass(frozen=True, eq=False)
class Segments:
    """All T tokens of a row, in their order. windows: what each layer asked for, once it has seen them."""

    of: list[Segment]
    windows: dict[int, int | None] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        return any(each.before for each in self.of)

    @cached_property
    def tiles(self) -> list[list[Segment]]:
        """Neighbours that are small together, and the others alone."""
        tiles: list[list[Segment]] = []
        for each in self.of:
            if tiles and each.end - tiles[-1][0].start <= ROWS:
                tiles[-1].append(each)
            else:
                tiles.append([each])
        return tiles

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """{start of a segment: (its tile, the start of that)}"""
        return {each.start: (number, tile[0].start) for number, tile in enumerate(self.tiles) for each in tile}

    @cached_property
    def owners(self) -> Tensor:
        """(3, T): the start of each token's segment, that of its prompt or −1, and its position."""
        lengths = torch.tensor([each.length for each in self.of])
        starts = [(each.start, each.prompt[0] if each.before else -1, each.before - each.start) for each in self.of]
        owners = torch.tensor(starts).T.repeat_interleave(lengths, 1)
        owners[2] += torch.arange(owners.shape[1])
        return owners

    @cached_property
    def keys(self) -> Tensor | None:
        """(K,) which tokens are the keys of one segment after the other; None: all in their order."""
        spans = [span for each in self.of for span in (each.prompt, (each.start, each.end))]
        return torch.cat([torch.arange(*span) for span in spans]) if self.shared else None

    @lru_cache(maxsize=2)  # noqa: B019  all layers ask for those of one row
    def flash_arguments(self, device: torch.device) -> dict[str, Any]:
        """By the names that transformers' flash attention has for them."""
        lengths = [each.length for each in self.of], [each.before + each.length for each in self.of]
        ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in lengths]
        longest = [max(n) for n in lengths]
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, [*ends, *longest]))


def use_packed_attention(model: "PreTrainedModel") -> None:
    """Where the model has transformers' sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation(NAME)


def arguments(model: "PreTrainedModel", segments: Segments) -> dict[str, Any]:
    """What the model's forward is called with for a packed row.

    A mask that is ready is handed on as it is; this one has nothing in it that could be taken for one.
    """
    position_ids = segments.owners[2:].to(model.device)
    if "flash" in model.config._attn_implementation:
        if segments.shared:
            raise NotImplementedError("transformers' flash attention knows no prompts that are shared")
        return {"position_ids": position_ids, **segments.flash_arguments(model.device)}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)
    return {"position_ids": position_ids, "attention_mask": mask, "segments": segments}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, d)
    key: Tensor,  # (1, key heads, T, d)
    value: Tensor,  # (1, key heads, T, d')
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, T, heads, d'), as transformers' AttentionInterface asks for; without `segments` it is transformers' sdpa.

    sliding_window: a token sees so many, itself included.
    """
    if segments is None:
        if attention_mask is None and 1 < query.shape[2] != key.shape[2] and getattr(module, "is_causal", True):
            raise NotImplementedError("it has fewer queries than keys, and no mask to say which they are")
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise NotImplementedError("it does not tell its attention the segments of a packed row")
        from transformers import AttentionInterface

        given = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window} | others
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **given)
    if strange := [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]:
        raise NotImplementedError(f"its attention has {strange[0]}, which that of packed rows does not know")
    if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape != (1, 1, 1, 1):
        raise NotImplementedError("it makes a mask of its own")
    segments.windows[getattr(module, "layer_idx", 0)] = sliding_window
    if len(segments.of) > 1 and not dropout and varlen_takes(query, value):
        return varlen(query, key, value, segments, sliding_window, scaling), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    size, width, grouped = value.shape[-1], max(query.shape[-1], value.shape[-1]), query.shape[1] != key.shape[1]
    if query.is_cuda and grouped and query.dtype not in HALF:  # there no kernel without scores takes groups
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        grouped = False
    # ... nor one where values are of another size than keys.
    query, key, value = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped}
    with fastest(query):
        parts = list(in_tiles(query, key, value, segments, sliding_window, options))
    return torch.cat(parts, 2)[..., :size].transpose(1, 2).contiguous(), None


def in_tiles(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, options: dict[str, Any]
) -> Iterator[Tensor]:
    """(1, heads, rows, d') of some rows after the other.

    The row is split once: the gradient of a slice would be as long as the row.
    """
    lengths = [tile[-1].end - tile[0].start for tile in segments.tiles]
    of_tiles = [each.split(lengths, 2) for each in (query, key, value)]
    for number, tile in enumerate(segments.tiles):
        q, k, v = (parts[number] for parts in of_tiles)
        first, end = tile[0], tile[-1].end
        prompts = list(dict.fromkeys(each.prompt for each in tile if each.before and each.prompt[0] < first.start))
        before = [[part_of(parts, segments, prompt) for prompt in prompts] for parts in of_tiles]
        if not (len(tile) == 1 and first.long):
            k, v = (torch.cat([*own, each], 2) if own else each for own, each in zip(before[1:], (k, v)))
            for start, rows in zip(range(first.start, end, ROWS), q.split(ROWS, 2)):
                stop = start + rows.shape[2]
                mask = visible(segments, (start, stop), [*prompts, (first.start, stop)], window).to(q.device)
                seen = mask.shape[1]  # the keys behind them are not read
                yield scaled_dot_product_attention(rows, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, **options)
        elif window is None or first.before + first.length <= window:
            q, k, v = (torch.cat([*own, each], 2) if own else each for own, each in zip(before, (q, k, v)))
            yield scaled_dot_product_attention(q, k, v, is_causal=True, **options)[:, :, first.before :]
        else:  # a window that is shorter
            blocks = [each.split(ROWS, 2) for each in (q, k, v)]
            for at, start in enumerate(range(first.start, end, ROWS)):
                back = max(0, (at * ROWS - window + 1) // ROWS)  # the first block that is not beyond the window
                near = bool(prompts) and at * ROWS - window + 1 < 0
                rows = start, min(start + ROWS, end)
                spans = [*prompts * near, (first.start + back * ROWS, rows[1])]
                mask = visible(segments, rows, spans, window).to(q.device)
                k, v = (
                    torch.cat([*own * near, *parts[back : at + 1]], 2) for own, parts in zip(before[1:], blocks[1:])
                )
                yield scaled_dot_product_attention(blocks[0][at], k, v, attn_mask=mask, **options)


def part_of(parts: Sequence[Tensor], segments: Segments, span: tuple[int, int]) -> Tensor:
    """(1, heads, n, d): that of a segment, from the parts of the tiles."""
    number, start = segments.places[span[0]]
    return parts[number][:, :, span[0] - start : span[1] - start]


def visible(segments: Segments, rows: tuple[int, int], spans: list[tuple[int, int]], window: int | None) -> Tensor:
    """(rows, keys) bool: which keys a query sees."""
    query, key = torch.arange(*rows), torch.cat([torch.arange(*span) for span in spans])
    owner, prompt, position = segments.owners[:, query, None]
    its_owner, _, its_position = segments.owners[:, key]
    seen = ((its_owner == owner) | (its_owner == prompt)) & (key <= query[:, None])
    return seen if window is None else seen & (position - its_position < window)


@cache
def varlen_attention() -> Any:
    """torch's, and whether it has to be told of fewer heads of keys (2.11 sees that itself); None: torch has none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_takes(query: Tensor, value: Tensor) -> bool:
    kernel = query.is_cuda and torch.version.cuda is not None and varlen_attention() is not None
    sizes = query.shape[-1] == value.shape[-1] <= 256
    return kernel and sizes and query.dtype in HALF


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scale: float | None
) -> Tensor:
    """(1, T, heads, d')"""
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, heads, d)
    if segments.keys is not None:
        index = segments.keys.to(query.device)
        k, v = k[index], v[index]
    attention, grouped = varlen_attention()
    options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if grouped:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return attention(q, k, v, *segments.flash_arguments(query.device).values(), **options)[None]


def fastest(query: Tensor) -> contextlib.AbstractContextManager:
    """On Hopper cuDNN's attention is 1.7 to 2.3 times as fast as the flash one that comes first elsewhere
    (huggingface/transformers#48163)."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] != 9:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
