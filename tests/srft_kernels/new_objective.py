"""An objective that the package does not have, as one would add it: a file, and a twin for the row kernels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import srft_kernels as sk
from srft_kernels.objectives.objective import ANNOTATIONS, Terms
from srft_kernels.objectives.ratios import silenced


@dataclass(frozen=True, repr=False)
class Unlikelihood(Terms, twin="tests.srft_kernels.new_objective:unlikelihood"):
    """−A·ℓ where A ≥ 0, and A·log(1 − p + floor)·trust elsewhere; annotations `advantages` and, new, `trust`."""

    floor: float = 0.1

    reads = (*ANNOTATIONS, "trust")
    learns_from = ("rollouts",)

    def requires(self, given: Collection[str]) -> tuple[str, ...]:
        return ("advantages", "trust", *super().requires(given))

    def _policy(self, stats: sk.TokenStats, tokens: sk.Tokens) -> Tensor:
        likely = silenced(-tokens.advantages, stats.logprobs)
        unlikely = tokens.advantages * tokens.trust * torch.log(1 - stats.logprobs.exp() + self.floor)
        return torch.where(tokens.advantages >= 0, likely, unlikely)


@triton.jit
def unlikelihood(O: tl.constexpr, numbers, columns, row, sampled, logprob, entropy, logsumexp, smooth):
    advantage = tl.load(columns.advantages + row)
    trust = tl.load(columns.trust + row)
    p = tl.exp(logprob)
    rest = 1 - p + numbers.floor
    loss = tl.where(advantage >= 0, -advantage * logprob, advantage * trust * tl.log(rest))
    g = tl.where(advantage >= 0, -advantage, -advantage * trust * p / rest)
    return loss, g, tl.zeros_like(g), tl.zeros_like(g)
