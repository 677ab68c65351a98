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

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .head import Head
from .plan import Plan
from .rows import Normalizer, in_three_steps
from .tokens import Tokens, TokenStats


@dataclass(frozen=True)
class Shard:
    """The entries of the vocabulary that lie on this rank.

    group   the ranks that share the head
    rank    this one's number among them
    rows    rows of W on each rank; entries are numbered through in the order of the ranks
    vocab   entries of the whole vocabulary; rows past it do not exist
    smooth  (K,) Σω of the class weights on each rank, where labels are smoothed
    """

    group: dist.ProcessGroup
    rank: int
    rows: tuple[int, ...]
    vocab: int
    smooth: Tensor | None = None

    @property
    def offset(self) -> int:
        """The first entry."""
        return sum(self.rows[: self.rank])

    @property
    def size(self) -> int:
        """How many of the rows exist; may be 0."""
        return min(max(self.vocab - self.offset, 0), self.rows[self.rank])

    @property
    def largest(self) -> int:
        """Rows of the largest part, after which all ranks choose the same plan."""
        return max(self.rows)

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(whether a target lies here, its place among this rank's entries, or 0), each shaped like target."""
        place = target - self.offset
        mine = (place >= 0) & (place < self.size)
        return mine, torch.where(mine, place, 0)

    def gather(self, part: Tensor) -> Tensor:
        """(K, ...) of every rank's (...)."""
        parts = part.new_empty(len(self.rows), *part.shape)
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=self.group)
        return parts

    def add_(self, part: Tensor) -> dist.Work:
        """Begin to add up the ranks' parts, in place."""
        return dist.all_reduce(part, group=self.group, async_op=True)

    def of_target(self, vector: Tensor, target: Tensor) -> Tensor:
        """The number that each target has in a vector divided like W's rows; 0 for a target out of range."""
        mine, place = self.local(target)
        found = torch.where(mine, vector[place], 0)
        self.add_(found).wait()
        return found

    def smoothing(self, smooth: Tensor) -> Shard:
        """With the class weights ω of the entries here."""
        return replace(self, smooth=self.gather(smooth.sum()))

    @classmethod
    def agreed(
        cls,
        group: dist.ProcessGroup,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        vocab_size: int | None,
        plan: Plan | None,
    ) -> Shard:
        """This rank's part of a call's head, as all ranks of the group understand it.

        A ValueError on all of them where they do not: they tell each other their arguments, on CPUs in every call, on
        accelerators (but for SRFT_KERNELS_CHECK=1) once for a head of these shapes, since nothing should wait there.
        """
        checks.group("group", group)
        _supported(plan, input, vocab_size)
        key = (group, *linear_weight.shape, vocab_size)
        if checks.may_look(input) or key not in _known:
            _known[key] = cls._asked(group, input, linear_weight, target, vocab_size, plan)
        return _known[key]

    @classmethod
    def _asked(
        cls,
        group: dist.ProcessGroup,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        vocab_size: int | None,
        plan: Plan | None,
    ) -> Shard:
        dx_wanted = torch.is_grad_enabled() and input.requires_grad
        any_wanted = dx_wanted or (torch.is_grad_enabled() and linear_weight.requires_grad)
        places = torch.arange(1, target.numel() + 1, device=target.device)
        alike = {
            "the number of tokens": target.numel(),
            "H": linear_weight.shape[1],
            "vocab_size": vocab_size or 0,
            "whether a gradient to input is wanted": int(dx_wanted),
            "whether any gradient is wanted": int(any_wanted),
            "plan.chunk_rows": plan.chunk_rows if plan else 0,
            "plan.passes": plan.passes or 0 if plan else 0,
            "plan.compact": -1 if plan is None or plan.compact is None else int(plan.compact),
            "a checksum of the targets": int((target.long().flatten() * places).sum()),
        }
        facts = torch.tensor([len(linear_weight), *alike.values()], device=input.device)
        everyone = [torch.empty_like(facts) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, facts, group=group)
        rows, *columns = torch.stack(everyone, 1).tolist()
        for name, found in zip(alike, columns):
            if len(set(found)) > 1:
                raise ValueError(
                    f"the ranks of group were called differently: {name} is {found}; all of them must get the same "
                    "hidden states, targets and options, and their own rows of the head"
                )
        if (vocab_size or 1) > sum(rows):
            raise ValueError(
                f"vocab_size is {vocab_size}, but linear_weight has only {sum(rows)} rows on all ranks of group "
                f"together, {rows}: pass every rank its own part of the head"
            )
        return cls(group, dist.get_rank(group), tuple(rows), vocab_size or sum(rows))


_known: dict[tuple, Shard] = {}


def _supported(plan: Plan | None, input: Tensor, vocab_size: int | None) -> None:
    if not (vocab_size is None or (isinstance(vocab_size, int) and vocab_size >= 1)):
        raise ValueError(f"vocab_size must be a positive integer, the whole vocabulary of group, found {vocab_size!r}")
    if plan is not None and plan.filter is not None:
        raise ValueError("Plan(filter=...) cannot be kept with group=: it bounds ∂L/∂x, of which a rank has a part")
    if plan is not None and plan.batch_invariant and input.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "Plan(batch_invariant=True) with group= holds for scoring alone: the order in which ranks add up ∂L/∂x "
            "depends on a token's place; call under torch.no_grad(), or drop batch_invariant"
        )


class ShardedRows:
    """The row operations on this rank's logits (n, V_r): targets and results are those of the whole vocabulary."""

    def __init__(self, rows: ModuleType, shard: Shard):
        self.rows, self.shard = rows, shard

    def statistics(
        self, logits: Tensor, target: Tensor, head: Head, block_rows: int, keep: bool = True
    ) -> tuple[TokenStats, Normalizer]:
        """As in rows/; the logits stay as they are."""
        shift, log_total, mean, at_target, *smooth = self.shard.gather(
            self._part(logits, target, head, block_rows)
        ).unbind(1)
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
        return TokenStats(at_target - log_total, log_total - mean, m + log_total, *smooth), Normalizer(
            m, log_total, mean
        )

    def loss_and_gradient(
        self,
        logits: Tensor,
        tokens: Tokens,
        weight: Tensor,
        objective: Any,
        head: Head,
        block_rows: int,
        dtype: torch.dtype,
    ) -> tuple[TokenStats, Tensor, Tensor]:
        asked = logits, tokens, weight, objective, head, block_rows, dtype
        return in_three_steps(self.statistics, self.gradient, *asked)

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        normalizer: Normalizer,
        coefs: tuple[Tensor | None, ...],
        head: Head,
        block_rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        if logits.shape[1] == 0:
            return logits.to(dtype)
        g, h, k, u = (*coefs, None)[:4]
        mine, place = self.shard.local(target)
        if g is not None:
            exists = (target >= 0) & (target < self.shard.vocab)
            elsewhere = torch.where(mine, 0, torch.where(exists, -g, torch.nan))
            g, k = torch.where(mine, g, 0), elsewhere if k is None else k + elsewhere
        if u is not None:  # the row operation knows of Σω on this rank alone
            elsewhere = -u * (self.shard.smooth.sum() - self.shard.smooth[self.shard.rank])
            k = elsewhere if k is None else k + elsewhere
        return self.rows.gradient(logits, place, normalizer, (g, h, k, u), head, block_rows, dtype)

    def _part(self, logits: Tensor, target: Tensor, head: Head, block_rows: int) -> Tensor:
        """(4 or 5, n): m_r, log s_r, mean_r, d at the target (−inf where it lies elsewhere), Σ ω_v d_v."""
        n, size = logits.shape
        part = logits.new_zeros(4 if head.smooth is None else 5, n)
        part[0], part[3] = -torch.inf, -torch.inf
        if size == 0:
            return part
        mine, place = self.shard.local(target)
        stats, (shift, log_total, mean) = self.rows.statistics(logits, place, head, block_rows, keep=True)
        found = [shift, log_total, mean, torch.where(mine, stats.logprobs + log_total, -torch.inf)]
        if head.smooth is not None:
            found.append(stats.smooth + self.shard.smooth[self.shard.rank] * log_total)
        return torch.where(shift == -torch.inf, part, torch.stack(found))  # where all is banned there is no d
