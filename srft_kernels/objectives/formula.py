"""A caller's own function as an objective."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from .objective import ANNOTATIONS, Objective, Tokens, TokenStats

# What a caller's own may have of an Objective; the others follow from these, or are for built-in ones.
ANSWERS = "token_local", *(n for n in vars(Objective) if n[0] != "_" and n not in ("twin", "reads", "has_metrics"))


class Formula(Objective):
    """A caller's own function or object as an Objective: what it has of those attributes counts.

    `token_local = False` (or a method of the annotations) may stand for `scope`: "batch".
    """

    def __init__(self, function: Callable[[TokenStats, Tokens], Tensor]):
        self.function, self.token_local = function, True
        for name in ANSWERS:
            answer = getattr(function, name, self)
            if answer is not self and not (answer is None and callable(getattr(self, name))):  # no method is None
                setattr(self, name, answer)
        self.reads = ANNOTATIONS if getattr(function, "requires", None) is not None else None
        self.has_metrics = getattr(function, "metrics", None) is not None

    def scope(self, names: Collection[str]) -> str:
        local = self.token_local(names) if callable(self.token_local) else self.token_local
        return "token" if local else "batch"

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        return self.function(stats, tokens)

    def __repr__(self) -> str:
        return repr(self.function)


def objective_of(value: Any) -> Objective:
    """An objective as the engine takes it. TypeError for what is none."""
    if isinstance(value, Objective):
        return value
    if not callable(value):
        raise TypeError(
            f"objective must be CrossEntropy(), PolicyGradient(), SRFT(), a preset such as srft_paper(), or a callable "
            f"(stats, tokens) -> losses, found {value!r}"
        )
    if isinstance(value, type) or getattr(value, "__module__", None) == f"{__package__}.presets":
        raise TypeError(f"objective is {value.__name__} itself, which makes one: call it, {value.__name__}()")
    return Formula(value)
