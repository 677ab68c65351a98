"""From the sequences of one step to microbatches: padded token ids for the backbone, flat tokens for the loss head.

Only completion tokens reach the loss head: the hidden state at position t predicts token t + 1, so `hidden_index` picks
the position before each completion token, and prompts and padding never meet the vocabulary.

A microbatch is some bins beside each other, padded to the longest. A bin holds a prompt and its completion. Where the
model allows it (see sharing.py), completions of one prompt share a bin, [prompt | completion | completion …]: each
attends to the prompt and to itself and continues the prompt's positions, as if it stood there alone.

Token weights are computed over the WHOLE step before it is cut, so that summing the microbatches' losses gives the same
loss and gradient whatever the token budget is.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import srft_kernels as sk
from srft.model import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sequence:
    """A prompt and what followed it: a rollout or a demonstration. Both parts are token ids and not empty."""

    prompt: list[int]
    completion: list[int]
    is_demo: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    finished: bool = True  # ended by itself


@dataclass(frozen=True)
class Microbatch:
    """Some sequences of a step. B bins of L padded tokens; n completion tokens of the step's N."""

    input_ids: Tensor  # (B, L) prompt + completions, each without its last token, padded right
    attention_mask: Tensor  # (B, L), or (B, 1, L, L) bool where completions share a prompt
    position_ids: Tensor | None  # (B, L); None: 0, 1, 2, …
    hidden_index: Tensor  # (n,) which of hidden.view(B·L, H) predicts the target
    step_index: Tensor  # (n,) where the token stands among the N tokens of the step
    target: Tensor  # (n,)
    annotations: dict[str, Tensor]  # (n,) each: token_weight, advantages, rewards, is_demo, sequence_ids


def token_weights(is_demo: Tensor, sequence_ids: Tensor, average: str, max_length: int) -> Tensor:
    """(N,) fp32 weights: demonstrations and rollouts are two losses, each averaged over its own tokens.

    `average`: "token" (mean of tokens), "sequence" (mean of the sequences' token means), or "constant" (sum divided by
    sequences × `max_length`).
    """

    def part(mask: Tensor) -> Tensor:
        if average == "token":
            return sk.token_mean(mask)
        if average == "sequence":
            return sk.sequence_mean(mask, sequence_ids)
        return sk.constant_length(mask, sequence_ids, max_length)

    return part(is_demo) + part(~is_demo)


def split_by_budget(lengths: SequenceOf[int], token_budget: int) -> list[list[int]]:
    """Indices in groups with (members × longest) ≤ `token_budget`, longest first.

    A sequence longer than the budget makes a group of its own: it cannot be cut.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def bins_by_prompt(sequences: SequenceOf[Sequence], longest: int) -> tuple[list[list[int]], list[int]]:
    """Indices of the sequences that share a bin, and the bins' lengths; shared bins have at most `longest` tokens."""
    bins: list[list[int]] = []
    lengths: list[int] = []
    latest: dict[tuple[int, ...], int] = {}  # the bin in progress of each prompt
    for index, s in enumerate(sequences):
        prompt, own = len(s.prompt), len(s.completion) - 1
        at = latest.get(tuple(s.prompt))
        if at is not None and lengths[at] + own <= longest and pays(prompt, lengths[at] - prompt, own):
            bins[at].append(index)
            lengths[at] += own
        else:
            latest[tuple(s.prompt)] = len(bins)
            bins.append([index])
            lengths.append(prompt + own)
    return bins, lengths


def pays(prompt: int, others: int, own: int) -> bool:
    """Is a completion of `own` tokens cheaper behind a prompt and `others` tokens than behind a prompt of its own?

    Attention computes the whole square of a bin and masks it, so what sharing saves on a prompt it may lose on the
    other completions. The matmuls of a token cost what its attention to 6 · hidden size others does, some 4000.
    """
    return 2 * own * others <= prompt * (prompt + 4000)


def lay_out(members: SequenceOf[Sequence]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, positions and parts (0: the prompt, k: completion k) of a bin's tokens; where each target is predicted."""
    start = len(members[0].prompt)
    ids, positions, parts, predictors = [*members[0].prompt], [*range(start)], [0] * start, []
    for part, s in enumerate(members, 1):
        own = len(s.completion) - 1  # the last token is a target only
        predictors += [start - 1, *range(len(ids), len(ids) + own)]
        ids += s.completion[:-1]
        positions += range(start, start + own)
        parts += [part] * own
    return ids, positions, parts, predictors


def padded(bins: SequenceOf[list[int]], fill: int = 0) -> Tensor:
    """(B, L)"""
    width = max(map(len, bins))
    return torch.tensor([each + [fill] * (width - len(each)) for each in bins])


def pack(
    sequences: SequenceOf[Sequence],
    *,
    token_budget: int,
    average: str = "token",
    max_length: int = 1,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    share_up_to: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> list[Microbatch]:
    """The step's sequences as microbatches of at most `token_budget` padded tokens; no sequences, no microbatches.

    share_up_to: the longest bin (tokens) in which completions may share their prompt; 0: they never do.
    rank, ranks: make the microbatches of one rank only, each K-th of them. All ranks get equally many, so that their
    collectives match: what is missing in the last round is one without completion tokens, whose gradient is 0. A step
    of few tokens is cut smaller, so that each rank has some.
    """
    if not sequences:
        return []
    lengths = torch.tensor([len(s.completion) for s in sequences])
    starts = lengths.cumsum(0) - lengths  # of each sequence among the step's N tokens

    def per_token(values: list) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths)

    step = {
        "advantages": per_token([float(s.advantage) for s in sequences]),
        "rewards": per_token([float(s.reward) for s in sequences]),
        "is_demo": per_token([s.is_demo for s in sequences]),
        "sequence_ids": per_token(list(range(len(sequences)))),
    }
    step["token_weight"] = token_weights(step["is_demo"], step["sequence_ids"], average, max_length)
    target = torch.tensor([token for s in sequences for token in s.completion])

    def microbatch(bins: list[list[int]]) -> Microbatch:
        ids, positions, parts, predictors = zip(*(lay_out([sequences[i] for i in members]) for members in bins))
        input_ids, part = padded(ids, pad_id), padded(parts)
        if shared := any(len(members) > 1 for members in bins):
            # Padding needs no masking: it stands behind everything that is causal.
            mask = ((part[:, :, None] == part[:, None]) | (part[:, None] == 0)).tril()[:, None]
        else:
            mask = padded([[1] * len(each) for each in ids])
        width = input_ids.shape[1]
        index = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for members in bins for i in members])
        return Microbatch(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=padded(positions).to(device) if shared else None,
            hidden_index=torch.cat([torch.tensor(at) + b * width for b, at in enumerate(predictors)]).to(device),
            step_index=index.to(device),
            target=target[index].to(device),
            annotations={name: values[index].to(device) for name, values in step.items()},
        )

    bins, bin_lengths = bins_by_prompt(sequences, min(token_budget, share_up_to))
    # A longer bin may need the model's own mask (of a sliding window): it never meets bins with the mask from here.
    within = [i for i, length in enumerate(bin_lengths) if length <= share_up_to]
    beyond = [i for i, length in enumerate(bin_lengths) if length > share_up_to]

    def cut(budget: int) -> list[list[list[int]]]:
        return [
            [bins[kind[i]] for i in members]
            for kind in (within, beyond)
            for members in split_by_budget([bin_lengths[i] for i in kind], budget)
        ]

    groups = cut(token_budget)
    while len(groups) < min(ranks, len(bins)):  # smaller ones rather than ranks without any
        token_budget //= 2
        groups = cut(token_budget)
    mine = [microbatch(group) for group in groups[rank::ranks]]
    return mine if len(groups[::ranks]) == len(mine) else [*mine, without_targets(microbatch(groups[-1]))]


def predictors(model: "PreTrainedModel", microbatch: Microbatch) -> Tensor:
    """(n, H) the hidden states that predict its targets; prompts and padding stay behind."""
    inputs = microbatch.input_ids, microbatch.attention_mask, microbatch.position_ids
    return hidden_states(model, *inputs).flatten(0, 1)[microbatch.hidden_index]


def without_targets(microbatch: Microbatch) -> Microbatch:
    """The same bins for the backbone, and nothing for the loss."""
    names = ("hidden_index", "step_index", "target")
    annotations = {name: values[:0] for name, values in microbatch.annotations.items()}
    return replace(microbatch, **{name: getattr(microbatch, name)[:0] for name in names}, annotations=annotations)
