"""Inputs of a case: hidden states, head, targets and annotations, random or like those of a policy in training.

Random rows have nearly flat distributions, on which anything that skips small probabilities looks good; "peaked" rows
have the entropy of a policy in reinforcement learning, and "model" ones are the embedded model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .cases import Case, Shape

IGNORED = -100
SEQUENCE = 64  # tokens per sequence: advantages belong to sequences
ENTROPY = (0.1, 0.5)  # nats


class Unavailable(Exception):
    """What is asked for is not installed, or cannot run on this device."""


@dataclass(frozen=True)
class Inputs:
    """x (N, H), W (V, H), target (N,) with ignored tokens, annotations (N,) by name; how many are live, on the host."""

    input: Tensor
    weight: Tensor
    target: Tensor
    columns: dict[str, Tensor]
    live_tokens: int | None = None

    @property
    def live(self) -> Tensor:
        return self.target != IGNORED

    def leaves(self, frozen: bool = False) -> Inputs:
        """The same memory asking for gradients."""
        return replace(
            self, input=self.input.detach().requires_grad_(), weight=self.weight.detach().requires_grad_(not frozen)
        )

    def copy(self) -> Inputs:
        return replace(self, input=self.input.clone(), weight=self.weight.clone())

    def of(self, tokens: Tensor) -> Inputs:
        """These tokens (n,) alone."""
        columns = {name: column[tokens] for name, column in self.columns.items()}
        return replace(self, input=self.input[tokens], target=self.target[tokens], columns=columns, live_tokens=None)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.input, self.weight))


def make(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """The case's inputs, the same every time. Raises Unavailable where they come from a model that is not there."""
    generator = torch.Generator(device).manual_seed(0)
    shape = case.shape
    x, weight, target = SOURCES[case.inputs](shape, device, dtype, generator)
    n = shape.tokens
    if case.live < 1:
        dead = torch.randperm(n, generator=generator, device=device)[case.live_tokens :]
        target = target.index_fill(0, dead, IGNORED)
    sequence_ids = torch.arange(n, device=device) // SEQUENCE
    count = -(-n // SEQUENCE)
    advantages = torch.randn(count, generator=generator, device=device)
    columns = {
        "advantages": advantages,
        "rewards": (advantages > 0).float(),
        "is_demo": torch.rand(count, generator=generator, device=device) < 0.3,
    }
    columns = {k: v[sequence_ids] for k, v in columns.items()} | {"sequence_ids": sequence_ids}
    return Inputs(x, weight, target, columns, case.live_tokens)


def random(shape: Shape, device: str, dtype: torch.dtype, generator: torch.Generator):
    """Independent normal x and W: logits of standard deviation 1."""
    n, h, v = shape.tokens, shape.hidden, shape.vocab
    x = torch.randn(n, h, generator=generator, device=device).to(dtype)
    weight = (torch.randn(v, h, generator=generator, device=device) / math.sqrt(h)).to(dtype)
    return x, weight, torch.randint(v, (n,), generator=generator, device=device)


def peaked(shape: Shape, device: str, dtype: torch.dtype, generator: torch.Generator):
    """Rows with a few likely tokens, scaled one by one to an entropy of 0.1–0.5 nats; targets drawn from them."""
    x, weight, target = random(shape, device, torch.float32, generator)
    n, v = shape.tokens, shape.vocab
    likely = torch.randint(v, (n, 4), generator=generator, device=device)
    wanted = torch.empty(n, device=device).uniform_(*ENTROPY, generator=generator)
    heights = torch.tensor([1.0, 0.7, 0.6, 0.5], device=device)  # of their logits before scaling
    chunk = max(1, 2**26 // v)
    for rows in (slice(i, i + chunk) for i in range(0, n, chunk)):
        of_likely = weight[likely[rows]]  # (n, 4, H)
        mixed = (of_likely / of_likely.square().sum(-1, keepdim=True) * heights[:, None]).sum(1)
        x[rows] = mixed + 0.1 * x[rows] / math.sqrt(shape.hidden)
        logits = x[rows] @ weight.t()
        scale = scale_to_entropy(logits, wanted[rows])
        x[rows] *= scale[:, None]
        target[rows] = torch.multinomial(logits.mul_(scale[:, None]).softmax(-1), 1, generator=generator)[:, 0]
    return x.to(dtype), weight.to(dtype), target


def scale_to_entropy(logits: Tensor, entropy: Tensor, steps: int = 14) -> Tensor:
    """(n,) factors on rows of logits (n, V) that give them these entropies: bisection, as entropy falls with scale."""
    low, high = torch.full_like(entropy, 0.25), torch.full_like(entropy, 64.0)
    for _ in range(steps):
        middle = (low * high).sqrt()
        too_flat = entropy_of(logits * middle[:, None]) > entropy
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return high


def entropy_of(logits: Tensor) -> Tensor:
    logits = logits - logits.amax(-1, keepdim=True)
    e = logits.exp()
    total = e.sum(-1)
    return total.log() - logits.mul_(e).sum(-1) / total


def model(shape: Shape, device: str, dtype: torch.dtype, generator: torch.Generator):
    """Hidden states of worked sums, the embedded model's head, and the text's own next tokens as targets."""
    x, weight, target = embedded(shape.tokens)
    if (shape.hidden, shape.vocab) != (weight.shape[1], weight.shape[0]):
        raise Unavailable(f"the embedded model's head is {weight.shape[1]}×{weight.shape[0]}")
    return x.to(device, dtype), weight.to(device, dtype), target.to(device)


@lru_cache(maxsize=1)
def embedded(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from srft.config import ModelConfig
        from srft.errors import UserError
        from srft.model import hidden_states, load_model
    except ImportError as error:
        raise Unavailable(f"the embedded model: {error}") from error
    try:
        loaded = load_model(ModelConfig(device="cpu"))
    except UserError as error:
        raise Unavailable(str(error)) from error
    ids = torch.tensor(loaded.tokenizer.encode(" ".join(worked_sums(tokens)))[: tokens + 1])[None]
    with torch.no_grad():
        hidden = hidden_states(loaded.model, ids[:, :-1])
    return hidden[0].clone(), loaded.model.get_output_embeddings().weight.detach().clone(), ids[0, 1:].clone()


def worked_sums(count: int) -> Iterator[str]:
    for i in range(count):
        a, b, c = 7 * i % 90 + 5, 11 * i % 70 + 3, 13 * i % 50 + 2
        total = a + b - c
        yield f"What is {a} + {b} - {c}? {a} + {b} = {a + b}, and {a + b} - {c} = {total}. The answer is {total}."


SOURCES = {"random": random, "peaked": peaked, "model": model}
