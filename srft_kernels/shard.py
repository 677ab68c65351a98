"""A head divided over a process group: every rank holds some rows of W, and all of them the same tokens.

What a token needs from other ranks' logits is a few numbers, so that the row operations of one rank (rows/) serve as
they are. The statistics of the ranks' parts (m_r, s_r, mean_r of Normalizer) make those of the whole vocabulary:

    m = max_r m_r     s_r' = e^{m_r − m} s_r     s = Σ_r s_r'     Σ_v p_v d_v = Σ_r (s_r' / s) (mean_r + m_r − m)

The ranks gather four numbers per token (five where labels are smoothed) in one collective, and add them up in the same
order: ℓ, H, lse and the loss are bitwise the same on every rank. Where a token's target lies on another rank, its g
adds only −g p_v to a column's gradient, which is what a k does: the coefficients move, the row operation stays. The
ranks' products for ∂L/∂x are added in fp32 and rounded once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .extras import ExtrasBuffer
from .head import Head
from .objectives.objective import Objective, Tokens, TokenStats
from .plan import Plan
from .rows import Coefs, Normalizer, RowOps, in_three_steps


@dataclass(frozen=True)
class Shard:
    """The entries of the vocabulary that lie on this rank.

    group   the ranks that share the head
    rank    this one's number among them
    sizes   rows of W on each rank; entries are numbered through in the order of the ranks
    vocab   entries of the whole vocabulary; rows past it do not exist
    smooth  (K,) Σω of the class weights on each rank, where labels are smoothed
    partial whether ∂L/∂x stays the part that comes from the entries here
    """

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    vocab: int
    smooth: Tensor | None = None
    partial: bool = False

    @property
    def offset(self) -> int:
        """The first entry."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """How many of the rows exist; may be 0."""
        return min(max(self.vocab - self.offset, 0), self.sizes[self.rank])

    @property
    def largest(self) -> int:
        """Rows of the largest part, after which all ranks choose the same plan."""
        return max(self.sizes)

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:  # (...)
        """(whether a target lies on this rank, its place among the entries here, or 0), each shaped like target."""
        place = target - self.offset
        mine = (place >= 0) & (place < self.size)
        return mine, torch.where(mine, place, 0)

    def gather(self, part: Tensor) -> Tensor:
        """(K, ...) of every rank's (...)."""
        parts = part.new_empty(len(self.sizes), *part.shape)
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=self.group)
        return parts

    def add_(self, part: Tensor) -> dist.Work:  # any shape
        """Begin to add up the ranks' parts, in place."""
        return dist.all_reduce(part, group=self.group, async_op=True)

    def of_target(self, vector: Tensor, target: Tensor) -> Tensor:  # (V_r,), (...)
        """The number that each target has in a vector divided like W's rows; 0 for a target out of range."""
        mine, place = self.local(target)
        values = torch.where(mine, vector[place], 0)
        self.add_(values).wait()
        return values

    def smoothing(self, smooth: Tensor) -> Shard:  # (V_r,)
        """With the class weights ω of the entries here."""
        return replace(self, smooth=self.gather(smooth.sum()))

    @classmethod
    def agreed(
        cls, group: dist.ProcessGroup, like: Tensor, linear_weight: Tensor, vocab_size: int | None,
        facts: Callable[[], dict[str, Any]], refused: Exception | None = None,
    ) -> Shard:  # any shape, (V_r, H)  # fmt: skip
        """This rank's part of a call's head, as all ranks of the group understand it.

        Where a rank has refused its arguments it raises why, and all others a ValueError that says so; where `facts`
        about them differ, a ValueError on all. They tell each other in one gather: on CPUs in every call, on
        accelerators (but for SRFT_KERNELS_CHECK=1) once for a head of this H and vocab_size, since nothing should wait
        there. Whether they do must not depend on what one rank alone knows, such as how many rows it has.
        """
        heads = _known.setdefault(group, {})
        vocab_size = None if vocab_size is None else int(vocab_size)
        key = None if refused else (vocab_size, linear_weight.shape[1])
        if checks.may_look(like) or not heads or not (refused or key in heads):
            told = {"error": f"{refused}"[:1000]} if refused else {"rows": len(linear_weight)}
            if not refused:
                told |= {HEAD: _fingerprint(linear_weight)}
                told |= {name: _plain(value) for name, value in facts().items()}
            everyone = _exchanged(group, told, like.device)
            rows = _compared(everyone, refused)
            _check_parts(rows, vocab_size, [facts[HEAD] for facts in everyone])
            heads[key] = tuple(rows)
        if refused:
            raise refused
        rows, rank = heads[key], dist.get_rank(group)
        if len(linear_weight) != rows[rank]:
            raise ValueError(
                f"linear_weight has {len(linear_weight)} rows here, but this group had {list(rows)} rows on its ranks "
                f"for vocab_size={vocab_size} before: pass vocab_size=, by which heads of a group are told apart"
            )
        return cls(group, rank, rows, vocab_size or sum(rows))


# Rows of each head on the ranks of a group, by (vocab_size, H); a group that is gone is forgotten.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int | None, int], tuple[int, ...]]] = WeakKeyDictionary()
ROOM = 8192  # bytes for what one rank tells the others; some thirty facts of 120 characters at most take less


HEAD = "a fingerprint of the head"


def _fingerprint(weight: Tensor) -> int | None:  # (V_r, H)
    """Of a few rows' bits; None where they are constant, as those of a head that is yet to be filled."""
    some = weight.detach()[:: max(1, len(weight) // 8)].contiguous()
    return checksum(some, None) if len(some) and bool((some != some[0, 0]).any()) else None


def _check_parts(rows: list[int], vocab_size: int | None, heads: list[int | None]) -> None:
    """Raise where the ranks' parts do not make one head."""
    if (vocab_size or 1) > sum(rows):
        raise ValueError(
            f"vocab_size is {vocab_size}, but linear_weight has only {sum(rows)} rows on all ranks of group "
            f"together, {rows}: pass every rank its own part of the head"
        )
    whole = vocab_size is not None and min(rows) >= vocab_size  # or all but one of padding alone
    if len(rows) > 1 and len(set(heads)) == 1 and (whole or heads[0] is not None):
        reason = f"which is all of vocab_size={vocab_size}" if whole else "and they are the same rows"
        raise ValueError(
            f"every rank of group passes a linear_weight of {rows[0]} rows, {reason}: with group= a rank passes its "
            "own rows of a divided head; drop group= where each has the whole one"
        )


def _exchanged(group: dist.ProcessGroup, told: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What all ranks tell, by one gather."""
    message = bytearray(json.dumps(told, ensure_ascii=False).encode().ljust(ROOM))
    mine = torch.frombuffer(message, dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [json.loads(bytes(message)) for message in torch.stack(everyone).tolist()]


def _plain(value: Any) -> Any:
    """A number or a short text that is the same wherever the value is: without addresses and numbers of devices."""
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, Real):  # NumPy's
        return float(value)
    text = value if isinstance(value, str) else re.sub(r" at 0x[0-9a-fA-F]+|, device='[^']*'", "", repr(value))
    return text if len(text) <= 120 else f"{text[:100]}… ({crc32(text.encode()):08x})"


def _compared(everyone: list[dict[str, Any]], refused: Exception | None) -> list[int]:
    """Rows on each rank, from what all of them told."""
    for rank, facts in enumerate(everyone):
        if "error" in facts:
            raise refused or ValueError(f"rank {rank} of group refused its arguments: {facts['error']}")
    for name in everyone[0]:
        values = [facts[name] for facts in everyone]
        if name not in ("rows", HEAD) and len(set(values)) > 1:
            raise ValueError(
                f"the ranks of group were called differently: {name} is {values}; all of them must get the same "
                "hidden states, targets and options, and their own rows of the head"
            )
    return [facts["rows"] for facts in everyone]


def checksum(value: Tensor, live: Tensor | None) -> int:
    """Of the bits of live tokens' numbers, from (..., k) and (...); ignored tokens may hold anything."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    tokens = value.detach().reshape(-1, value.shape[-1]).view(bits)
    sums = torch.cat([some.sum(-1, dtype=torch.int64) for some in tokens.split(256)])  # sums of a copy in int64
    places = torch.arange(1, len(sums) + 1, device=value.device)
    return int((sums * places if live is None else sums * places * live.reshape(-1)).sum())


def supported(plan: Plan | None, input: Tensor, vocab_size: int | None, partial: bool) -> None:  # (..., H)
    """Raise for what a divided head cannot do."""
    if not (vocab_size is None or (checks.integer(vocab_size) and vocab_size >= 1)):
        raise ValueError(f"vocab_size must be a positive integer, the whole vocabulary of group, found {vocab_size!r}")
    if plan is not None and plan.filter is not None:
        raise ValueError("Plan(filter=...) cannot be kept with group=: it bounds ∂L/∂x, of which a rank has a part")
    if plan is not None and plan.batch_invariant and not partial and input.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "Plan(batch_invariant=True) with group= holds for scoring alone: the order in which ranks add up ∂L/∂x "
            "depends on a token's place; call under torch.no_grad(), or drop batch_invariant"
        )


@dataclass(frozen=True)
class ShardedRows:
    """RowOps (see rows/) on this rank's logits (n, V_r): targets and results are those of the whole vocabulary."""

    rows: RowOps
    shard: Shard

    def statistics(
        self, logits: Tensor, target: Tensor, head: Head, extras: ExtrasBuffer | None = None
    ) -> tuple[TokenStats, Normalizer]:  # (n, V_r), (n,)
        shift, log_total, mean, at_target, *smooth = self.shard.gather(self._part(logits, target, head)).unbind(1)
        m = shift.amax(0)
        fall = shift - m  # (K, n)
        log_totals = log_total + fall
        most, where = log_totals.max(0)  # of a total near 1 the logarithm is exact, and what the others add
        log_total = most + (log_totals - most).exp().scatter(0, where[None], 0).sum(0).log1p()
        p = (log_totals - log_total).exp()
        mean = torch.where(p == 0, 0, p * (mean + fall)).sum(0)
        exists = (target >= 0) & (target < self.shard.vocab)
        at_target = torch.where(exists, (at_target + fall).amax(0), torch.nan)
        if smooth:
            omega = self.shard.smooth[:, None]
            moved = smooth[0] + torch.where(omega == 0, 0, omega * fall)
            smooth = [moved.sum(0) - omega.sum() * log_total]
        stats = TokenStats(at_target - log_total, log_total - mean, m + log_total, *smooth)
        return stats, Normalizer(m, log_total, mean)

    def loss_and_gradient(
        self, logits: Tensor, dlogits: Tensor, tokens: Tokens, weight: Tensor, objective: Objective, head: Head,
        extras: ExtrasBuffer | None = None,
    ) -> tuple[TokenStats, Tensor]:  # (n, V_r), (n, V_r), (n,)  # fmt: skip
        return in_three_steps(self, logits, dlogits, tokens, weight, objective, head)

    def gradient(
        self, logits: Tensor, dlogits: Tensor, target: Tensor, normalizer: Normalizer, coefs: Coefs, head: Head
    ) -> None:  # (n, V_r), (n, V_r), (n,)
        if logits.shape[1] == 0:
            return
        g, h, k, u = (*coefs, None)[:4]
        mine, place = self.shard.local(target)
        if g is not None:
            exists = (target >= 0) & (target < self.shard.vocab)
            elsewhere = torch.where(mine, 0, torch.where(exists, -g, torch.nan))
            g, k = torch.where(mine, g, 0), elsewhere if k is None else k + elsewhere
        if u is not None:  # the row operation knows of Σω on this rank alone
            elsewhere = -u * (self.shard.smooth.sum() - self.shard.smooth[self.shard.rank])
            k = elsewhere if k is None else k + elsewhere
        self.rows.gradient(logits, dlogits, place, normalizer, (g, h, k, u), head)

    def _part(self, logits: Tensor, target: Tensor, head: Head) -> Tensor:  # (n, V_r), (n,)
        """(4 or 5, n): m_r, log s_r, mean_r, d at the target (−inf where it lies elsewhere), Σ ω_v d_v."""
        n, size = logits.shape
        part = logits.new_zeros(4 if head.smooth is None else 5, n)
        part[0], part[3] = -torch.inf, -torch.inf
        if size == 0:
            return part
        mine, place = self.shard.local(target)
        stats, (shift, log_total, mean) = self.rows.statistics(logits, place, head)
        fields = [shift, log_total, mean, torch.where(mine, stats.logprobs + log_total, -torch.inf)]
        if head.smooth is not None:
            fields.append(stats.smooth + self.shard.smooth[self.shard.rank] * log_total)
        return torch.where(shift == -torch.inf, part, torch.stack(fields))  # where all is banned there is no d
