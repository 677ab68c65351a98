"""Token weights: how the losses of tokens are averaged. Each function returns fp32 weights shaped like `mask`.

`linear_loss(..., token_weight=w)` computes Σ_t w_t · loss_t, so an average is a choice of weights made once, over
the whole optimisation step: the gradient then does not depend on how the step is cut into microbatches.

Where the tokens of a step are divided over ranks, each passes its own, and their process group as `token_group`: it
gets the weights that its tokens have in one process. Ids mean the same on all ranks; a sequence may lie on several.
Losses and gradients of the ranks' tokens then have to be summed, not averaged; see docs/scale.md.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .objectives.ratios import groups


def token_mean(mask: Tensor, *, token_group: ProcessGroup | None = None) -> Tensor:
    """Every live token counts alike: 1 / (number of live tokens). `mask` is boolean, of any shape."""
    mask = _boolean(mask)
    return mask.float() / summed(mask.sum(), token_group).clamp(min=1)


def sequence_mean(mask: Tensor, sequence_ids: Tensor, *, token_group: ProcessGroup | None = None) -> Tensor:
    """Every sequence counts alike: 1 / (live tokens of its sequence · sequences with a live token). (GRPO)

    `sequence_ids` holds an integer ≥ 0 per token, shaped like mask; ids need not be contiguous.
    """
    mask, lengths, sequences = _sequence_lengths(mask, sequence_ids, token_group)
    return mask / (lengths * sequences)


def constant_length(
    mask: Tensor, sequence_ids: Tensor, length: float, *, token_group: ProcessGroup | None = None
) -> Tensor:  # (...), (...)
    """Every token counts 1 / (sequences with a live token · length), whatever its sequence's own length. (Dr. GRPO)

    `length` is in tokens, usually the longest completion allowed.
    """
    if not length > 0:
        raise ValueError(f"length must be a positive number of tokens, found {length}")
    mask, _, sequences = _sequence_lengths(mask, sequence_ids, token_group)
    return mask / (sequences * length)


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
    shape = tuple(is_demo.shape)
    for name, value in (("rewards", rewards), ("prompt_ids", prompt_ids), ("sequence_ids", sequence_ids)):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be shaped like is_demo {shape}, found {tuple(value.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], the share of successes to exceed, found {threshold}")
    demo = is_demo.bool().flatten()
    live = torch.ones_like(demo) if mask is None else _boolean(mask).flatten()
    (demo, live, rewards, prompt_ids, sequence_ids), own = gathered(
        token_group, demo, live, rewards, prompt_ids, sequence_ids
    )
    prompt, sequence = groups(prompt_ids), groups(sequence_ids)
    zeros = torch.zeros(len(demo), device=demo.device, dtype=torch.float64)

    def per_prompt(tokens: Tensor) -> Tensor:  # (n,)
        """Sequences among `tokens`, counted per prompt: each of its n tokens is worth 1/n."""
        rollout = tokens.double()
        length = zeros.index_add(0, sequence, (live & ~demo).double()).clamp(min=1)
        return zeros.index_add(0, prompt, rollout / length[sequence])[prompt]

    rollouts = live & ~demo
    succeeds = per_prompt(rollouts & (rewards > 0)) > threshold * per_prompt(rollouts) + 1e-9
    return (live & (demo != succeeds))[own].view(shape)


def _boolean(mask: Tensor) -> Tensor:  # (...)
    if mask.is_floating_point():
        raise TypeError(f"mask must be boolean, found {mask.dtype}; write mask > 0")
    return mask.bool()


def _sequence_lengths(
    mask: Tensor, sequence_ids: Tensor, token_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:  # (...), (...)
    """(mask as fp32, live tokens of each token's sequence, sequences with one); neither count is under 1."""
    if sequence_ids.shape != mask.shape:
        raise ValueError(
            f"sequence_ids must be shaped like mask {tuple(mask.shape)}, found {tuple(sequence_ids.shape)}"
        )
    (live, ids), own = gathered(token_group, _boolean(mask).float(), sequence_ids)
    distinct, inverse = ids.unique(return_inverse=True)
    lengths = torch.zeros(len(distinct), device=mask.device).scatter_add_(0, inverse, live)
    of_token = lengths.clamp(min=1)[inverse[own]].view(mask.shape)
    return live[own].view(mask.shape), of_token, (lengths > 0).sum().clamp(min=1)


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
