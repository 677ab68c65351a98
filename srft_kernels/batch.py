"""The batch: which tokens are worked through, in which order, and how their results get back to their places.

Ignored tokens should cost nothing, and leaving them out takes their number on the host. On a CPU it is there. On an
accelerator asking for it would stall the stream, so there the tokens left out are those that the caller counted
(`live_tokens`), and what stays of the ignored ones is a dead row.

What a token of the input can be, here and in the annotations that an objective sees:

    ignored     its target is ignore_index             left out, or dead: without loss and gradient either way
    dead        ignored but kept, or padding           `live` is False; hidden states 0, weight 0, results replaced by 0
    live        any other                              `live` is True, or None where all are
      counted   of token weight ≠ 0                    `tokens.counted`; averages and metrics are over these
      idle      that surely has no gradient            after the active ones; the first product and not the other two
      active    not idle                               the first `active` of the batch; all three products

Idle is what an objective's `inactive` says, and a token of weight 0 on which no other token's loss depends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .head import rows_of
from .objectives.objective import Objective, Tokens


@dataclass(frozen=True)
class Batch:
    """The n tokens that are worked through, in their order.

    shape     of the input's tokens, N in all
    tokens    the annotations of the n
    weight    (n,) their token weights, in the statistics' type; 0 where dead
    active    the first `active` of them may carry gradient
    index     places among the N of those that are no padding, (n,) or fewer; None: all N, in place
    live      (n,) False where dead; None: nowhere
    overfull  () whether more tokens are live than the caller said, and every result NaN; None: that cannot be
    zero      () a 0 on the device, where one is there: PyTorch makes that of a number by a kernel
    """

    shape: torch.Size
    tokens: Tokens
    weight: Tensor
    active: int
    index: Tensor | None = None
    live: Tensor | None = None
    overfull: Tensor | None = None
    zero: Tensor | int = 0

    def __len__(self) -> int:
        return len(self.weight)

    def hidden(self, input: Tensor, chunk: slice) -> Tensor:  # (N, H)
        """Hidden states (n, H) of some of the rows; zeros where dead, since 0 · NaN would reach the head's gradient."""
        x = rows_of(input, chunk) if self.index is None else input[rows_of(self.index, chunk)]
        if self.live is None:
            return x
        live = rows_of(self.live, chunk)
        missing = len(live) - len(x)  # rows of padding
        zero = self.zero if x.is_floating_point() else 0
        return torch.where(live[:, None], x if missing == 0 else pad(x, (0, 0, 0, missing)), zero)

    def __getitem__(self, rows: Tensor) -> Batch:  # (m,)
        """Some of the rows, by their numbers: all active."""
        index = rows if self.index is None else self.index[rows]
        live = None if self.live is None else self.live[rows]
        return Batch(self.shape, self.tokens[rows], self.weight[rows], len(rows), index, live)

    def packed(self, field: Tensor) -> Tensor:  # (...)
        """A field shaped like the input's tokens as the rows have it (n,), padding included."""
        field = field.reshape(-1)
        field = field if self.index is None else field[self.index]
        return pad(field, (0, len(self) - len(field)))

    def spread(self, field: Tensor) -> Tensor:  # (n, ...)
        """A field of the rows back in the shape of the input's tokens, with 0, of integers −1, at ignored ones."""
        if (live := self.live) is not None:
            empty = 0 if field.is_floating_point() else -1
            field = torch.where(live if field.dim() == 1 else live[:, None], field, empty)
        return self.placed(field)

    def placed(self, field: Tensor) -> Tensor:  # (n, ...)
        """The same of a field that has these already where a row is dead."""
        empty, wrong = (0, torch.nan) if field.is_floating_point() else (-1, -1)
        rows = self.shape.numel() if self.index is None else self.index.numel()
        if rows != field.shape[0]:
            field = field[:rows]
        if self.overfull is not None:
            field = torch.where(self.overfull, wrong, field)
        if self.index is not None:
            all_tokens = field.new_full((self.shape.numel(), *field.shape[1:]), empty)
            field = all_tokens.index_copy(0, self.index, field)
        return field if self.shape == field.shape[:1] else field.reshape(self.shape + field.shape[1:])

    def padded(self, multiple: int) -> Batch:
        """Dead rows added at the end, up to a multiple of so many; `index` does not name them."""
        extra = -self.weight.numel() % multiple
        if extra == 0:
            return self
        live = torch.ones_like(self.weight, dtype=torch.bool) if self.live is None else self.live
        live, weight = pad(live, (0, extra)), pad(self.weight, (0, extra))
        tokens = _tempered(self.tokens.map(lambda column: pad(column, (0, extra))).replace(live=live))
        return replace(self, tokens=tokens, weight=weight, active=len(weight), live=live)


def select(
    tokens: Tokens, live: Tensor | None, weight: Tensor | None, objective: Objective, dtype: torch.dtype, *,
    shape: torch.Size, compact: bool, live_tokens: int | None = None, multiple: int = 1, by_triton: bool = False,
) -> Batch:  # (N,), (N,)  # fmt: skip
    """The batch of a call with N tokens.

    live         boolean; None: all are
    weight       token weights; None: 1 / (number of live tokens)
    shape        of the input's tokens
    live_tokens  no more tokens than this are live; with more of them every result is NaN
    compact      count on the host: leave out every ignored token, and put those without gradient last
    multiple     so many rows, or a multiple, are worked through: dead ones fill up the last chunk
    by_triton    prepare fp32 tokens that stay in place by one kernel; columns are contiguous then
    """
    alone = objective.scope(tokens) == "token"
    # a loss over several tokens that does not read `tokens.live` would average over ignored ones
    if compact or not (alone or objective.reads_live):
        batch = _compacted(tokens, live, weight, objective, dtype, shape, reorder=multiple == 1)
    else:
        batch = _masked(tokens, live, weight, dtype, shape, live_tokens, by_triton)
    batch = batch.padded(multiple)
    if weight is not None and objective.reads_live and not alone:
        batch = replace(batch, tokens=batch.tokens.replace(counted=batch.weight != 0))
    return batch


def _masked(
    tokens: Tokens, live: Tensor | None, weight: Tensor | None, dtype: torch.dtype, shape: torch.Size,
    live_tokens: int | None, by_triton: bool,
) -> Batch:  # (N,), (N,)  # fmt: skip
    """All tokens in place, or the live ones first and no more than `live_tokens`; nothing waits for the device."""
    total = tokens.target.numel()  # len() would be a constant of an exported graph, here and below
    if live is None:
        if weight is None:
            weight = torch.full((total,), 1 / max(total, 1), dtype=dtype, device=tokens.target.device)
        return Batch(shape, tokens, weight, total)
    if by_triton and (live_tokens is None or live_tokens >= total):
        from .rows.triton_rows import prepare

        target, weight, zero = prepare(live, tokens.target, None if weight is None else weight.to(dtype))
        tokens = _tempered(tokens.replace(target=target, live=live))
        return Batch(shape, tokens, weight, total, live=live, zero=zero)
    count = live.sum()
    weight = live.to(dtype) / count.clamp(min=1) if weight is None else torch.where(live, weight, 0).to(dtype)
    index = overfull = None
    if live_tokens is not None and live_tokens < total:
        index = live.logical_not().to(torch.uint8).argsort(stable=True)[:live_tokens]
        overfull = count > live_tokens
        tokens, live, weight = tokens[index], live[index], torch.where(overfull, torch.nan, weight[index])
    tokens = _tempered(tokens.replace(target=torch.where(live, tokens.target, 0), live=live))
    return Batch(shape, tokens, weight, weight.numel(), index, live, overfull)


def _compacted(
    tokens: Tokens, live: Tensor | None, weight: Tensor | None, objective: Objective, dtype: torch.dtype,
    shape: torch.Size, reorder: bool,
) -> Batch:  # (N,), (N,)  # fmt: skip
    """The live tokens alone, active ones first if they may be reordered; waits for their number."""
    total = len(tokens.target)
    if live is None:
        live = torch.ones(total, dtype=torch.bool, device=tokens.target.device)
    active = live
    # a token of weight 0 is idle only if no other token's loss depends on it
    if reorder and weight is not None and objective.scope(tokens) == "token":
        active = live & (weight != 0)
    if reorder and (inactive := objective.inactive(tokens)) is not None:
        active = active & ~inactive
    if active is live:
        count = active_count = int(live.sum())
    else:
        count, active_count = torch.stack([live.sum(), active.sum()]).tolist()
    index = None
    if active_count < total:
        order = torch.where(active, 0, torch.where(live, 1, 2)).argsort(stable=True)
        index = order[:count]
        tokens = tokens[index]
        weight = weight if weight is None else weight[index]
    if weight is None:
        weight = torch.full((count,), 1 / max(count, 1), dtype=dtype, device=live.device)
    return Batch(shape, tokens, weight, active_count, index)


def _tempered(tokens: Tokens) -> Tokens:
    """Dead rows at a temperature of 1, whatever theirs was: 0 / 0 would reach the head's gradient."""
    if (temperature := tokens.get("temperature")) is None:
        return tokens
    return tokens.replace(temperature=torch.where(tokens.live, temperature, 1))


def sequence_chunks(batch: Batch, chunk_rows: int) -> tuple[slice, ...] | None:
    """Chunks of whole sequences, those of active rows first; None where one does not fit or is not in one piece.

    Looks at `sequence_ids` on the host.
    """
    ids, lengths = batch.tokens.sequence_ids.unique_consecutive(return_counts=True)
    if len(ids.unique()) < len(ids):
        return None
    chunks, start, end = [], 0, 0
    for length in lengths.tolist():
        if length > chunk_rows or end < batch.active < end + length:
            return None
        if end + length > start + chunk_rows or end == batch.active:
            chunks.append(slice(start, end))
            start = end
        end += length
    chunks.append(slice(start, end))
    return tuple(chunk for chunk in chunks if chunk.start < chunk.stop)
