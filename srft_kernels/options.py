"""What of a compiled call is constant, as one string that an operator can take, and what follows from it.

The string is an expression that makes an `Options`. Dynamo evaluates `encoded` while it traces, and so guards on every
number in it; a graph that is kept on disk means the same in another process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from math import inf, nan
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from . import output
from .checks import BUILT_IN
from .correction import Correction
from .distillation import DistillationArguments
from .extras import Extras, TokenExtras
from .filter import Filter
from .plan import Plan
from .prepare import passes
from .tokens import Tokens, TokenStats

STATISTICS = ("logprobs", "entropy", "logsumexp", "smooth")
EXTRAS = tuple(field.name for field in fields(TokenExtras))
GRADIENTS = ("dx", "dW", "db")
TEACHING = ("teacher_input", "teacher_weight", "teacher_bias", "mask", "token_weight")
BESIDE = ("candidates", "input", "linear_weight", "linear_bias", *TEACHING)


@dataclass(frozen=True)
class Around:
    """What is around a compiled call.

    wanted       whether x, W and b want a gradient
    autocast     the type that it casts to, or None where it is off
    """

    wanted: tuple[bool, ...]
    autocast: str | None

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple(name for name, wanted in zip(GRADIENTS, self.wanted) if wanted)


@dataclass(frozen=True)
class Options(Around):
    """What is constant in a compiled call.

    made         what is differentiated: "loss", a scalar; "losses", one of each token; "statistics"
    annotations  names of the tensors given as such
    candidates   whether extras has some

    The others are those of `Arguments`; temperature is None where a tensor is given.
    """

    made: str
    annotations: tuple[str, ...]
    candidates: bool
    objective: Any
    temperature: float | None
    softcap: float | None
    logit_scale: float
    ignore_index: int | None
    vocab_size: int | None
    reduction: str | None
    plan: Plan | None
    extras: Extras | None

    @property
    def statistics(self) -> tuple[str, ...]:
        return STATISTICS if getattr(self.objective, "label_smoothing", 0) else STATISTICS[:3]


@dataclass(frozen=True)
class DistillationOptions(Around):
    """What is constant in a compiled call of `linear_distillation`: its arguments without the tensors."""

    arguments: DistillationArguments


def encoded(value: Any, name: str = "options") -> str:
    """The expression of a constant, None for the tensors that are passed beside. Raises TypeError for any other."""
    if value is None or (name in BESIDE and isinstance(value, Tensor)):
        return "None"
    if isinstance(value, (bool, str)):
        return f"{value!r}"
    if isinstance(value, (int, float)):
        return f"{guard_scalar(value)!r}"  # may be symbolic: a number that has changed between calls
    if isinstance(value, tuple):
        return f"({''.join([f'{encoded(item, name)}, ' for item in value])})"
    if type(value).__name__ in NAMES and is_dataclass(value):  # Dynamo cannot ask the latter of a number of NumPy
        parts = [f"{field.name}={encoded(getattr(value, field.name), field.name)}" for field in fields(value)]
        return f"{type(value).__name__}({', '.join(parts)})"
    raise TypeError(f"{name} must be a constant of Python in a compiled call, found {type(value).__name__}")


CLASSES = (*BUILT_IN, Options, DistillationOptions, DistillationArguments, Correction, Extras, Filter, Plan)
NAMES = {cls.__name__: cls for cls in CLASSES} | {"inf": inf, "nan": nan}


@lru_cache(maxsize=1024)
def decoded(options: str) -> Any:
    return eval(options, {"__builtins__": {}}, NAMES)


@torch.compiler.assume_constant_result
def in_one_pass(options: str, device: str) -> bool:
    """Whether gradients are made in the forward; so they are too where the data tell whether one pass can make them."""
    o = decoded(options)
    if o.made != "loss" or not any(o.wanted):
        return False
    plan = o.plan or Plan()
    number = passes(plan, o.objective, o.annotations)
    may_cut = (device == "cpu" if plan.compact is None else plan.compact) and not plan.batch_invariant
    return number == 1 or (number is None and may_cut)


@torch.compiler.assume_constant_result
def result_names(options: str, in_one_pass: bool) -> tuple[str, ...]:
    """What one_pass or two_pass returns, what is differentiated first."""
    o = decoded(options)
    made = () if o.made == "statistics" else (o.made,)
    asked = ()
    if o.extras is not None:
        top = o.extras.top_k > 0
        given = o.extras.rank, o.extras.argmax, top, top, o.candidates
        asked = tuple(name for name, wanted in zip(EXTRAS, given) if wanted)
    filtered = ("filtered",) * (o.plan is not None and o.plan.filter is not None and o.made == "loss")
    last = ("scale", *o.gradients) if in_one_pass else ("kept",) * any(o.wanted)
    return *made, *o.statistics, *asked, *filtered, *last


@torch.compiler.assume_constant_result
def metric_names(options: str) -> tuple[str, ...]:
    """The metrics that a call has where there is a live token."""
    o = decoded(options)
    one = torch.zeros(1)
    stats, tokens = TokenStats(one, one, one, one), Tokens(one.long(), **dict.fromkeys(o.annotations, one))
    argmax = tokens.target if o.extras is not None and o.extras.argmax else None
    filtered = None if o.plan is None or o.plan.filter is None else torch.zeros(4)
    return tuple(output.metrics(o.objective, stats, tokens, filtered, argmax))
