"""Which tokens are worked through, in which order, and how their results get back to their places.

Ignored tokens should cost nothing, and leaving rows out takes their number on the host. On a CPU it is there. On an
accelerator asking for it would stall the stream, so there the rows left out are those that the caller counted
(`live_tokens`); ignored tokens that stay are dead rows: weight 0, hidden states and results replaced by 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .head import Head
from .tokens import Tokens, token_local


@dataclass(frozen=True)
class Rows:
    """The n tokens that are worked through, in their order.

    index    (n,) their places among the N tokens of the input; None: all of them, in place
    active   the first `active` of them may carry gradient
    tokens   their annotations
    weight   (n,) their token weights, in the statistics' type; 0 where dead
    live     (n,) False at ignored tokens among them; None: there are none
    """

    index: Tensor | None
    active: int
    tokens: Tokens
    weight: Tensor
    live: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weight)

    def hidden(self, input: Tensor, chunk: slice) -> Tensor:
        """Hidden states (n, H) of some of the rows; zeros where dead, since 0 · NaN would reach the head's gradient."""
        x = input[chunk] if self.index is None else input[self.index[chunk]]
        if self.live is None:
            return x
        live = self.live[chunk]
        missing = len(live) - len(x)  # rows of padding
        return torch.where(live[:, None], x if missing == 0 else pad(x, (0, 0, 0, missing)), 0)

    def head(self, head: Head, chunk: slice) -> Head:
        """The head of some of the rows: their temperatures, where each token has its own."""
        temperature = self.tokens.get("temperature")
        return head if temperature is None else replace(head, temperature=temperature[chunk])

    def only(self, keep: Tensor) -> Rows:
        """Some of the rows, by their numbers (m,): all active."""
        index = keep if self.index is None else self.index[keep]
        live = None if self.live is None else self.live[keep]
        return Rows(index, len(keep), self.tokens.rows(keep), self.weight[keep], live)

    def padded(self, multiple: int) -> Rows:
        """Dead rows added at the end, up to a multiple of so many; `index` does not name them."""
        extra = -self.weight.numel() % multiple
        if extra == 0:
            return self
        live = torch.ones_like(self.weight, dtype=torch.bool) if self.live is None else self.live
        tokens = self.tokens.map(lambda column: pad(column, (0, extra)))
        tokens = _tempered(tokens.replace(live=pad(live, (0, extra))))
        return Rows(self.index, len(tokens.target), tokens, pad(self.weight, (0, extra)), tokens.live)


def pack(
    tokens: Tokens,
    live: Tensor | None,
    weight: Tensor | None,
    objective: Any,
    dtype: torch.dtype,
    live_tokens: int | None,
    compact: bool,
    multiple: int = 1,
) -> tuple[Rows, Callable[[Tensor], Tensor]]:
    """(Rows, what puts a field (n, ...) of theirs back into (N, ...), with 0, of integers −1, at ignored tokens).

    live         (N,) boolean; None: all are
    weight       (N,) token weights; None: 1 / (number of live tokens)
    live_tokens  no more tokens than this are live; with more of them every result is NaN
    compact      count on the host: leave out every ignored token, and put those without gradient last
    multiple     so many rows, or a multiple, are worked through: dead ones fill up the last chunk
    """
    overfull = None
    if compact or _sees_only_live_tokens(objective, tokens):
        rows = _compacted(tokens, live, weight, objective, dtype, reorder=multiple == 1)
    else:
        rows, overfull = _masked(tokens, live, weight, dtype, live_tokens)
    spread = _spread(rows.index, rows.live, overfull, rows.weight.numel(), tokens.target.numel())
    rows = rows.padded(multiple)
    if weight is not None and getattr(objective, "reads_live", False) and not token_local(objective, tokens):
        rows = replace(rows, tokens=rows.tokens.replace(counted=rows.weight != 0))
    return rows, spread


def _masked(
    tokens: Tokens, live: Tensor | None, weight: Tensor | None, dtype: torch.dtype, live_tokens: int | None
) -> tuple[Rows, Tensor | None]:
    """(Rows, whether more tokens are live than the caller said; None where that cannot be)."""
    total = tokens.target.numel()  # len() would be a constant of an exported graph, here and below
    if live is None:
        if weight is None:
            weight = torch.full((total,), 1 / max(total, 1), dtype=dtype, device=tokens.target.device)
        return Rows(None, total, tokens, weight), None
    count = live.sum()
    weight = live.to(dtype) / count.clamp(min=1) if weight is None else torch.where(live, weight, 0).to(dtype)
    index = overfull = None
    if live_tokens is not None and live_tokens < total:
        index = live.logical_not().to(torch.uint8).argsort(stable=True)[:live_tokens]
        overfull = count > live_tokens
        tokens, live, weight = tokens.rows(index), live[index], torch.where(overfull, torch.nan, weight[index])
    tokens = _tempered(tokens.replace(target=torch.where(live, tokens.target, 0), live=live))
    return Rows(index, weight.numel(), tokens, weight, live), overfull


def _tempered(tokens: Tokens) -> Tokens:
    """Dead rows at a temperature of 1, whatever theirs was: 0 / 0 would reach the head's gradient."""
    if (temperature := tokens.get("temperature")) is None:
        return tokens
    return tokens.replace(temperature=torch.where(tokens.live, temperature, 1))


def sequence_chunks(rows: Rows, chunk_rows: int) -> tuple[slice, ...] | None:
    """Chunks of whole sequences, those of active rows first; None where one does not fit or is not in one piece.

    Looks at `sequence_ids` on the host.
    """
    ids, lengths = rows.tokens.sequence_ids.unique_consecutive(return_counts=True)
    if len(ids.unique()) < len(ids):
        return None
    chunks, start, end = [], 0, 0
    for length in lengths.tolist():
        if length > chunk_rows or end < rows.active < end + length:
            return None
        if end + length > start + chunk_rows or end == rows.active:
            chunks.append(slice(start, end))
            start = end
        end += length
    chunks.append(slice(start, end))
    return tuple(chunk for chunk in chunks if chunk.start < chunk.stop)


def _sees_only_live_tokens(objective: Any, tokens: Tokens) -> bool:
    """A loss over several tokens that does not read `tokens.live` would average over ignored ones."""
    return not token_local(objective, tokens) and not getattr(objective, "reads_live", False)


def _compacted(
    tokens: Tokens, live: Tensor | None, weight: Tensor | None, objective: Any, dtype: torch.dtype, reorder: bool
) -> Rows:
    total = len(tokens.target)
    if live is None:
        live = torch.ones(total, dtype=torch.bool, device=tokens.target.device)
    active = live
    # a token of weight 0 is idle only if no other token's loss depends on it
    if reorder and weight is not None and token_local(objective, tokens):
        active = live & (weight != 0)
    if reorder and (inactive := getattr(objective, "inactive", None)) and (idle := inactive(tokens)) is not None:
        active = active & ~idle
    count, active_count = torch.stack([live.sum(), active.sum()]).tolist()
    index = None
    if active_count < total:
        order = torch.where(active, 0, torch.where(live, 1, 2)).argsort(stable=True)
        index = order[:count]
        tokens = tokens.rows(index)
        weight = weight if weight is None else weight[index]
    if weight is None:
        weight = torch.full((count,), 1 / max(count, 1), dtype=dtype, device=live.device)
    return Rows(index, active_count, tokens, weight)


def _spread(
    index: Tensor | None, live: Tensor | None, overfull: Tensor | None, rows: int, total: int
) -> Callable[[Tensor], Tensor]:
    def spread(field: Tensor) -> Tensor:
        empty, wrong = (0, torch.nan) if field.is_floating_point() else (-1, -1)
        field = field[:rows]
        if live is not None:
            field = torch.where(live if field.dim() == 1 else live[:, None], field, empty)
        if overfull is not None:
            field = torch.where(overfull, wrong, field)
        return field if index is None else field.new_full((total, *field.shape[1:]), empty).index_copy(0, index, field)

    return spread
