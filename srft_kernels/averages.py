"""Token weights: how the losses of tokens are averaged. Each function returns fp32 weights shaped like `mask`.

`linear_loss(..., token_weight=w)` computes Σ_t w_t · loss_t, so an average is a choice of weights made once, over
the whole optimisation step: the gradient then does not depend on how the step is cut into microbatches.

Where the tokens of a step are divided over ranks, each passes its own, and their process group as `token_group`: it
gets the weights that its tokens have in one process. Ids mean the same on all ranks; a sequence may lie on several.
Losses and gradients of the ranks' tokens then have to be summed, not averaged; see docs/scale.md.
"""

from __future__ import annotations

from math import inf

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .objectives.ratios import exact, groups


@checks.told
def token_mean(mask: Tensor, *, token_group: ProcessGroup | None = None) -> Tensor:
    """Every live token counts alike: 1 / (number of live tokens). `mask` is boolean, of any shape."""
    live = _boolean(mask)
    return _weights(live, summed(live.sum(), token_group))


@checks.told
def sequence_mean(
    mask: Tensor, sequence_ids: Tensor, *, sequences: int | None = None, token_group: ProcessGroup | None = None
) -> Tensor:  # (...), (...)
    """Every sequence counts alike: 1 / (live tokens of its sequence · sequences with a live token). (GRPO)

    `sequence_ids` holds an integer ≥ 0 per token, shaped like mask; ids need not be contiguous. `sequences` counts
    instead of those with a live token, where sequences that are masked out are to count too (TRL, Liger: the batch
    size), or a step's microbatches get their weights one by one; with `token_group`, those of all ranks.
    """
    live, lengths, count = _sequence_lengths(mask, sequence_ids, sequences, token_group)
    return _weights(live, lengths * count)


@checks.told
def constant_length(
    mask: Tensor, sequence_ids: Tensor, length: float, *, sequences: int | None = None,
    token_group: ProcessGroup | None = None,
) -> Tensor:  # (...), (...)  # fmt: skip
    """Every token counts 1 / (sequences with a live token · length), whatever its sequence's own length. (Dr. GRPO)

    `length` is in tokens, usually the longest completion allowed; `sequences` as in `sequence_mean`.
    """
    if not (checks.real(length) and 0 < length < inf):
        raise ValueError(f"length must be a positive number of tokens, found {length!r}")
    live, _, count = _sequence_lengths(mask, sequence_ids, sequences, token_group)
    return _weights(live, count * float(length))


@checks.told
def hpt_switch(
    is_demo: Tensor, rewards: Tensor, prompt_ids: Tensor, sequence_ids: Tensor, threshold: float = 0.0,
    mask: Tensor | None = None, *, token_group: ProcessGroup | None = None,
) -> Tensor:  # (...) each  # fmt: skip
    """Tokens that learn under HPT's switch (arXiv 2509.04419), boolean, shaped like is_demo.

    Where the share of a prompt's rollouts with a reward > 0 exceeds `threshold` (γ), its rollouts; elsewhere, and where
    a prompt has none, its demonstrations. `rewards` holds at every token the reward of its sequence: on one of n tokens
    alone it would count 1/n. `prompt_ids` and `sequence_ids` hold integers ≥ 0; tokens outside `mask` do not count. Use
    the result as a mask: token_weight=constant_length(mask & switch, sequence_ids, length).
    """
    checks.tensor("is_demo", is_demo)
    checks.numbers("is_demo", is_demo)
    columns = {"rewards": rewards, "prompt_ids": prompt_ids, "sequence_ids": sequence_ids}
    for name, value in {**columns, **({} if mask is None else {"mask": mask})}.items():
        checks.shaped_like(name, value, is_demo, "is_demo")
    if not (checks.real(threshold) and 0 <= threshold <= 1):
        raise ValueError(f"threshold must lie in [0, 1], the share of successes to exceed, found {threshold!r}")
    shape, demo = is_demo.shape, is_demo.bool().flatten()
    live = torch.ones_like(demo) if mask is None else mask.bool().flatten()
    (demo, live, rewards, prompt_ids, sequence_ids), own = gathered(
        token_group, demo, live, rewards, prompt_ids, sequence_ids
    )
    # of all ranks' tokens, so that all of them raise
    if checks.may_look(rewards) and (wrong := rewards.isnan() & live & ~demo).any():
        raise ValueError(f"rewards are NaN at {int(wrong.sum())} tokens of rollouts, which neither succeed nor fail")
    prompt, sequence = groups(prompt_ids), groups(sequence_ids)
    zeros = torch.zeros_like(demo, dtype=exact(demo.device))

    def per_prompt(tokens: Tensor) -> Tensor:  # (n,)
        """Sequences among `tokens`, counted per prompt: each of its n tokens is worth 1/n."""
        rollout = tokens.to(zeros.dtype)
        length = zeros.index_add(0, sequence, (live & ~demo).to(zeros.dtype)).clamp(min=1)
        return zeros.index_add(0, prompt, rollout / length[sequence])[prompt]

    rollouts = live & ~demo
    succeeds = per_prompt(rollouts & (rewards > 0)) > threshold * per_prompt(rollouts) + 1e-9
    return (live & (demo != succeeds))[own].view(shape)


def _boolean(mask: Tensor) -> Tensor:  # (...)
    checks.tensor("mask", mask)
    checks.numbers("mask", mask)
    return mask.bool()


def _weights(live: Tensor, count: Tensor) -> Tensor:  # (...), (...) or ()
    """1 / count where live, in fp32; rounded once, and counts of 2²⁵ tokens are exact."""
    return (live / count.to(exact(live.device)).clamp(min=1)).float()


def _sequence_lengths(
    mask: Tensor, sequence_ids: Tensor, sequences: int | None, token_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (...)
    """(which tokens are live, live tokens of each one's sequence, how many sequences count), the last two integers."""
    live = _boolean(mask)
    checks.shaped_like("sequence_ids", sequence_ids, mask, "mask")
    if not (sequences is None or (checks.integer(sequences) and sequences >= 1)):
        raise ValueError(f"sequences must be a number of sequences, an integer ≥ 1, found {sequences!r}")
    (of_all, ids), own = gathered(token_group, live, sequence_ids)
    distinct, inverse = ids.unique(return_inverse=True)
    lengths = torch.zeros_like(distinct, dtype=torch.int64).scatter_add_(0, inverse, of_all.long())
    count = (lengths > 0).sum()
    if sequences is not None:
        if checks.may_look(live) and count > sequences:
            raise ValueError(f"sequences={sequences}, but {int(count)} have a live token: count those too")
        count = torch.full_like(count, int(sequences))
    return live, lengths[inverse[own]].view(mask.shape), count


def summed(value: Tensor, token_group: ProcessGroup | None) -> Tensor:  # any shape
    """The sum over the ranks, if there is a group."""
    if token_group is not None:
        checks.group("token_group", token_group)
        value = value.clone()
        dist.all_reduce(value, group=token_group)
    return value


def gathered(token_group: ProcessGroup | None, *columns: Tensor) -> tuple[list[Tensor], slice]:
    """(columns (n,) of all ranks' tokens, which of them are this rank's), from columns (...) of this rank's tokens.

    Ranks may have different numbers of tokens. Waits for the device: such averages are made once per step.
    """
    flat = [column.reshape(-1) for column in columns]
    if token_group is None:
        return flat, slice(None)
    checks.group("token_group", token_group)
    count = torch.full((1,), len(flat[0]), dtype=torch.int64, device=flat[0].device)
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
