"""Tokens divided over a process group: what an average over all of them takes from the other ranks.

Losses and gradients of the ranks' tokens then have to be summed, not averaged; see docs/scale.md.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks


def summed(value: Tensor, token_group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks, if there is a group."""
    if token_group is not None:
        checks.group("token_group", token_group)
        value = value.clone()
        dist.all_reduce(value, group=token_group)
    return value


def gathered(token_group: dist.ProcessGroup | None, *columns: Tensor) -> tuple[list[Tensor], slice]:
    """(columns (n,) of all ranks' tokens, which of them are this rank's), from columns (...) of this rank's tokens.

    Ranks may have different numbers of tokens. Waits for the device: such averages are made once per step.
    """
    flat = [column.reshape(-1) for column in columns]
    if token_group is None:
        return flat, slice(None)
    checks.group("token_group", token_group)
    count = torch.tensor([len(flat[0])], device=flat[0].device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(token_group))]
    dist.all_gather(counts, count, group=token_group)
    counts = torch.cat(counts).tolist()
    everyone = []
    for column in flat:
        padded = column.new_zeros(max(counts))
        padded[: len(column)] = column
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=token_group)
        everyone.append(torch.cat([part[:n] for part, n in zip(parts, counts)]))
    start = sum(counts[: dist.get_rank(token_group)])
    return everyone, slice(start, start + len(flat[0]))
