"""How the gradients of demonstrations and of a model's own rollouts are to each other, in SRFT's loss."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

import srft_kernels as sk
from srft.learn.packing import Sequence, pack, predictors
from srft.model import LoadedModel, head_of


@dataclass(frozen=True)
class Gradients:
    """Of all weights. cosine: NaN where one of them is 0."""

    demonstrations: float  # norms
    rollouts: float
    cosine: float

    @property
    def share(self) -> float:
        """Of demonstrations; NaN where both are 0."""
        total = self.demonstrations + self.rollouts
        return self.demonstrations / total if total else float("nan")


def gradients(loaded: LoadedModel, sequences: SequenceOf[Sequence], temperature: float, token_budget: int) -> Gradients:
    """Of the loss of SRFT's paper on what a step would learn from: each part is averaged over its own tokens."""
    training = loaded.model.training
    loaded.model.eval()  # dropout would be a difference
    of_demos, of_rollouts = (
        gradient(loaded, [s for s in sequences if s.is_demo == is_demo], temperature, token_budget)
        for is_demo in (True, False)
    )
    loaded.model.train(training)
    squares = [torch.stack([g.square().sum() for g in each]).sum() for each in (of_demos, of_rollouts)]
    product = torch.stack([(a * b).sum() for a, b in zip(of_demos, of_rollouts)]).sum()
    one, another = (float(square.sqrt()) for square in squares)
    return Gradients(one, another, float(product) / (one * another) if one * another else float("nan"))


def gradient(
    loaded: LoadedModel, sequences: SequenceOf[Sequence], temperature: float, token_budget: int
) -> list[Tensor]:
    """Of each weight, in fp32; 0 without sequences."""
    parameters = [each for each in loaded.model.parameters() if each.requires_grad]
    microbatches = pack(
        sequences, token_budget=token_budget, pad_id=loaded.pad_id, device=loaded.device, rows=loaded.rows
    )
    for m in microbatches:
        hidden, head = predictors(loaded.model, m), head_of(loaded.model)
        out = sk.linear_loss(
            hidden, target=m.target, objective=sk.srft_paper(), temperature=temperature, **head, **m.annotations
        )
        out.loss.backward()
    found = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in parameters]
    loaded.model.zero_grad(set_to_none=True)
    return found
