"""The same as `nn.Module`s, for code that holds its loss as a module. They own no parameters: the model does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import LossOutput, linear_cross_entropy, linear_loss
from .presets import srft_paper


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its options fixed: loss = module(input, linear_weight, target)."""

    def __init__(self, weight: Tensor | None = None, **options: Any):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.options = options

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None
    ) -> Tensor:
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SRFTLoss(nn.Module):
    """`linear_loss` with its objective (default `srft_paper()`) and options fixed.

    out = module(input, linear_weight, target, is_demo=..., advantages=..., rewards=...); see `linear_loss`.
    """

    def __init__(self, objective: Any = None, **options: Any):
        super().__init__()
        self.objective = srft_paper() if objective is None else objective
        self.options = options

    def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor, **annotations: Any) -> LossOutput:
        return linear_loss(input, linear_weight, target, self.objective, **{**self.options, **annotations})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.options.items())])
