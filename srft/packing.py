"""From the sequences of one step to microbatches: padded token ids for the backbone, flat tokens for the loss head.

Only completion tokens reach the loss head: the hidden state at position t predicts token t + 1, so `hidden_rows` picks
the position before each completion token, and prompts and padding never meet the vocabulary.

Token weights are computed over the WHOLE step before it is cut, so that summing the microbatches' losses gives the same
loss and gradient whatever the token budget is.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

import srft_kernels as sk


@dataclass(frozen=True)
class Sequence:
    """A prompt and what followed it: a rollout or a demonstration. Both parts are token ids and not empty."""

    prompt: list[int]
    completion: list[int]
    is_demo: bool = False
    reward: float = 0.0
    advantage: float = 0.0


@dataclass(frozen=True)
class Microbatch:
    """Some sequences of a step. B rows of L padded tokens; n completion tokens of the step's N."""

    input_ids: Tensor  # (B, L) prompt + completion without its last token, padded right
    attention_mask: Tensor  # (B, L)
    hidden_rows: Tensor  # (n,) row of hidden.view(B·L, H) that predicts the target
    step_rows: Tensor  # (n,) where the token stands among the N tokens of the step
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


def pack(
    sequences: SequenceOf[Sequence],
    *,
    token_budget: int,
    average: str = "token",
    max_length: int = 1,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> list[Microbatch]:
    """The step's sequences as microbatches of at most `token_budget` padded tokens; no sequences, no microbatches."""
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

    def microbatch(members: list[int]) -> Microbatch:
        inputs = [sequences[i].prompt + sequences[i].completion[:-1] for i in members]
        width = max(map(len, inputs))
        firsts = [row * width + len(sequences[i].prompt) - 1 for row, i in enumerate(members)]
        counts = [len(sequences[i].completion) for i in members]
        hidden_rows = torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, counts)])
        step_rows = torch.cat([torch.arange(starts[i], starts[i] + n) for i, n in zip(members, counts)])
        return Microbatch(
            input_ids=torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in inputs]).to(device),
            attention_mask=torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs]).to(device),
            hidden_rows=hidden_rows.to(device),
            step_rows=step_rows.to(device),
            target=target[step_rows].to(device),
            annotations={name: values[step_rows].to(device) for name, values in step.items()},
        )

    lengths_in = [len(s.prompt) + len(s.completion) - 1 for s in sequences]
    return [microbatch(members) for members in split_by_budget(lengths_in, token_budget)]
