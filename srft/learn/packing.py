"""From the sequences of one step to microbatches: token ids for the backbone, flat tokens for the loss head.

Only completion tokens reach the loss head: the hidden state at position t predicts token t + 1, so `hidden_index` picks
the position before each completion token, and prompts and padding never meet the vocabulary.

A microbatch is one row of bins behind each other, without padding. A bin holds a prompt and its completion, or, as
[prompt | completion | completion …], several of one prompt: each attends to the prompt and to itself and continues the
prompt's positions, as if it stood there alone (model/attention.py). What a model does not follow (model/rows.py) is not
done: its completions have prompts of their own, or its bins stand beside each other, padded to the longest.

Token weights are computed over the WHOLE step before it is cut, so that summing the microbatches' losses gives the same
loss and gradient whatever the token budget is.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import srft_kernels as sk
from srft.model import PADDED, Rows, Segment, Segments, hidden_states

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
    """Some sequences of a step; n completion tokens of the step's N."""

    input_ids: Tensor  # (1, T) prompts and completions, the latter without their last tokens; or (B, L), padded right
    segments: Segments | None  # of the T tokens; None where each row is a sequence
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


@dataclass
class Bin:
    """[prompt | completion | completion …].   members: which sequences of the step.   tokens: of all of it.

    longest: tokens of the longest prompt and completion.
    """

    members: list[int]
    tokens: int
    longest: int

    def takes(self, prompt: int, own: int, token_budget: int) -> bool:
        """One more completion of `own` tokens? Each has the prompt's keys beside its own.

        A key is some 34 times smaller than what a token leaves for the backward pass: together they are at most half
        of that, and beside a mask about as much.
        """
        keys = self.tokens + prompt * len(self.members)
        return self.tokens + own <= token_budget and keys <= 16 * self.tokens


def bins_by_prompt(sequences: SequenceOf[Sequence], rows: Rows, token_budget: int) -> list[Bin]:
    """Sequences that share a prompt, as far as they fit into the budget, or each its own bin."""
    bins: list[Bin] = []
    latest: dict[tuple[Any, ...], Bin] = {}  # the bin in progress of each prompt
    for index, s in enumerate(sequences):
        own = len(s.completion) - 1  # the last token is a target only
        length = len(s.prompt) + own
        key = (tuple(s.prompt), length > rows.apart)
        at = latest.get(key)
        if rows.shared and at is not None and at.takes(len(s.prompt), own, token_budget):
            at.members.append(index)
            at.tokens += own
            at.longest = max(at.longest, length)
        else:
            latest[key] = Bin([index], length, length)
            bins.append(latest[key])
    return bins


def split_by_budget(bins: SequenceOf[Bin], token_budget: int, padded: bool) -> list[list[Bin]]:
    """In groups of at most `token_budget` tokens, each bin padded to the group's longest or not; longest first.

    A bin longer than the budget makes a group of its own: it cannot be cut.
    """
    groups: list[list[Bin]] = []
    sizes: list[int] = []
    for each in sorted(bins, key=lambda each: (-each.tokens, each.members)):
        grown = [size + (group[0].tokens if padded else each.tokens) for group, size in zip(groups, sizes)]
        number = next((i for i, size in enumerate(grown) if size <= token_budget), len(groups))
        if number == len(groups):
            groups.append([])
            sizes.append(0)
            grown.append(each.tokens)
        groups[number].append(each)
        sizes[number] = grown[number]
    return groups


def lay_out(members: SequenceOf[Sequence], start: int) -> tuple[list[int], list[Segment], list[int]]:
    """A bin from token `start` of a row on: its ids, its segments, and the tokens that predict its targets."""
    prompt = start, start + len(members[0].prompt)
    ids, segments, predictors = [*members[0].prompt], [Segment(*prompt)], []
    for s in members:
        at = start + len(ids)
        ids += s.completion[:-1]
        segments.append(Segment(at, start + len(ids), prompt))
        predictors += [prompt[1] - 1, *range(at, start + len(ids))]
    if len(members) == 1:
        segments = [Segment(start, start + len(ids))]
    return ids, [each for each in segments if each.length], predictors


def pack(
    sequences: SequenceOf[Sequence],
    *,
    token_budget: int,
    average: str = "token",
    max_length: int = 1,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    rows: Rows = PADDED,
    rank: int = 0,
    ranks: int = 1,
) -> list[Microbatch]:
    """The step's sequences as microbatches of at most `token_budget` tokens; no sequences, no microbatches.

    rows: how they may stand together.
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

    def microbatch(bins: list[Bin]) -> Microbatch:
        width = 0 if rows.packed else max(each.tokens for each in bins)
        ids: list[int] = []
        segments: list[Segment] = []
        predictors: list[int] = []
        for each in bins:
            of_bin = lay_out([sequences[i] for i in each.members], len(ids))
            ids += of_bin[0] + [pad_id] * (width - each.tokens)
            segments += of_bin[1]
            predictors += of_bin[2]
        index = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for each in bins for i in each.members])
        return Microbatch(
            input_ids=torch.tensor(ids, device=device).view(1 if rows.packed else len(bins), -1),
            segments=Segments(segments) if rows.packed else None,
            hidden_index=torch.tensor(predictors, device=device),
            step_index=index.to(device),
            target=target[index].to(device),
            annotations={name: values[index].to(device) for name, values in step.items()},
        )

    def cut(budget: int) -> list[list[Bin]]:
        bins = bins_by_prompt(sequences, rows, budget)
        kinds = [[each for each in bins if (each.longest > rows.apart) == beyond] for beyond in (False, True)]
        return [group for kind in kinds for group in split_by_budget(kind, budget, padded=not rows.packed)]

    groups = cut(token_budget)
    while len(groups) < min(ranks, len(sequences)):  # smaller ones rather than ranks without any
        token_budget //= 2
        groups = cut(token_budget)
    mine = [microbatch(group) for group in groups[rank::ranks]]
    return mine if len(groups[::ranks]) == len(mine) else [*mine, without_targets(microbatch(groups[-1]))]


def predictors(model: "PreTrainedModel", microbatch: Microbatch) -> Tensor:
    """(n, H) the hidden states that predict its targets; prompts and padding stay behind."""
    return hidden_states(model, microbatch.input_ids, microbatch.segments).flatten(0, 1)[microbatch.hidden_index]


def without_targets(microbatch: Microbatch) -> Microbatch:
    """The same bins for the backbone, and nothing for the loss."""
    names = ("hidden_index", "step_index", "target")
    annotations = {name: values[:0] for name, values in microbatch.annotations.items()}
    return replace(microbatch, **{name: getattr(microbatch, name)[:0] for name in names}, annotations=annotations)
