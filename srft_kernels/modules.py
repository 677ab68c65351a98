"""The same as `nn.Module`s, for code that holds its loss as a module. They own no parameters: the model does."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import checks, words
from .call import OPTIONS
from .functional import linear_cross_entropy, linear_loss
from .objectives.formula import objective_of
from .objectives.presets import srft_paper
from .output import LossOutput


class _Loss(nn.Module):
    """A function's options, for all calls of it. Copies share the process groups among them, which cannot be saved."""

    def __init__(self, options: dict[str, Any]):  # (V,)
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        memo |= {id(option): option for option in self.options.values() if isinstance(option, ProcessGroup)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        for name, option in self.options.items():
            if isinstance(option, ProcessGroup):
                raise TypeError(
                    f"{type(self).__name__}({name}=...) holds a process group, which only the processes that made it "
                    f"know: save its state_dict(), or options.pop({name!r}) before and options[{name!r}] = ... after"
                )
        return self.__dict__


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` with its options fixed: loss = module(input, linear_weight, target)."""

    def __init__(self, weight: Tensor | None = None, **options: Any):  # (V,)
        checks.reduction(options.get("reduction", "mean"))
        super().__init__(options)
        self.register_buffer("weight", weight, persistent=False)

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None
    ) -> Tensor:  # (..., H), (V, H), (...)
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, **self.options
        )


class SRFTLoss(_Loss):
    """`linear_loss` with its objective (default `srft_paper()`) and options fixed.

    out = module(input, linear_weight, target, is_demo=..., advantages=..., rewards=...); see `linear_loss`.
    """

    def __init__(self, objective: Any = None, **options: Any):  # (V,)
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"SRFTLoss() has no option {name}{words.meant(name, OPTIONS)}")
        super().__init__(options)
        self.objective = srft_paper() if objective is None else objective
        objective_of(self.objective)  # raises for what is none

    def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor, **annotations: Any) -> LossOutput:
        return linear_loss(input, linear_weight, target, self.objective, **{**self.options, **annotations})

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (repr(self.objective), super().extra_repr())))
