"""A compiled call as an operator can take it: its tensors, and all that is constant in it as one string.

Dynamo evaluates `encoded` while it traces, and so guards on every number in it; a graph that is kept on disk means the
same in another process. The string is a literal of Python: a dataclass is [its name, {field: value}], a tensor
["Tensor"], to be filled in by order, a number that is not finite ["float", its name].
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from .. import checks
from ..call import Arguments, HeadArguments
from ..distillation.engine import DistillationArguments
from ..extras import Extras
from ..objectives.objective import BUILT_IN
from ..objectives.ratios import Correction
from ..plan import Filter, Plan


@dataclass(frozen=True)
class CompiledCall:
    """A call and what is around it.

    result      what is differentiated: "loss", a scalar; "losses", one of each token; "statistics"; "divergence"
    needs_grad  whether x, W and b need a gradient
    autocast    the type that it casts to, or None where it is off
    """

    arguments: Arguments | DistillationArguments
    result: str
    needs_grad: tuple[bool, ...]
    autocast: str | None


CLASSES = {
    cls.__name__: cls
    for cls in (Arguments, CompiledCall, Correction, DistillationArguments, Extras, Filter, HeadArguments, Plan)
}
ANY = torch.empty(0, dtype=torch.float32, device="meta")  # stands for a tensor where none is needed


def encoded(value: Any, name: str, kind: str, tensors: list[Tensor]) -> str:
    """The literal of a value whose field has a type called `kind`; its tensors are appended to `tensors`.

    TypeError for what is neither a tensor where one may be nor a constant.
    """
    if kind == "Tensor" or (kind == "Tensor | None" and value is not None):
        checks.tensor(name, value)
        checks.untransformed(name, value)
    if isinstance(value, Tensor) and "Tensor" in kind:
        tensors.append(value.detach())
        return "['Tensor']"
    if value is None or isinstance(value, (bool, str)):
        return f"{value!r}"
    if isinstance(value, (int, float)):
        number = guard_scalar(value)  # may be symbolic: a number that has changed between calls
        return f"{number!r}" if -float("inf") < number < float("inf") else f"['float', '{number!r}']"
    if isinstance(value, tuple):
        return f"({''.join([f'{encoded(item, name, kind, tensors)}, ' for item in value])})"
    if isinstance(value, dict):
        items = [f"{key!r}: {encoded(item, key, 'Tensor', tensors)}" for key, item in value.items()]
        return f"{{{', '.join(items)}}}"
    known = CLASSES if type(value).__name__ in CLASSES else BUILT_IN
    if type(value).__name__ in known and known[type(value).__name__] is type(value):
        items = [
            f"{field.name!r}: {encoded(getattr(value, field.name), field.name, field.type, tensors)}"
            for field in fields(value)
            if field.name != "live_tokens"  # which may change from call to call
        ]
        return f"['{type(value).__name__}', {{{', '.join(items)}}}]"
    raise TypeError(f"{name} must be a constant of Python in a compiled call, found {type(value).__name__}")


@lru_cache(maxsize=1024)
def decoded(constants: str) -> CompiledCall:
    """The call, with ANY in place of its tensors and without its number of live tokens."""
    return _value(ast.literal_eval(constants))


def _value(literal: Any) -> Any:
    if isinstance(literal, dict):
        return {name: _value(item) for name, item in literal.items()}
    if isinstance(literal, tuple):
        return tuple(map(_value, literal))
    if not isinstance(literal, list):
        return literal
    name, *rest = literal
    if name == "Tensor":
        return ANY
    if name == "float":
        return float(rest[0])
    return (CLASSES.get(name) or BUILT_IN[name])(**_value(rest[0]))


def restored(constants: str, tensors: Iterable[Tensor], live_tokens: int | None) -> CompiledCall:
    """The call with its tensors, in the order in which `encoded` found them."""
    call = decoded(constants)
    arguments = _filled(call.arguments, iter(tensors))
    if isinstance(arguments, Arguments):
        arguments = replace(arguments, live_tokens=live_tokens)
    return replace(call, arguments=arguments)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _filled(item, tensors) for name, item in value.items()}
    if isinstance(value, (HeadArguments, Extras)):
        return replace(value, **{field.name: _filled(getattr(value, field.name), tensors) for field in fields(value)})
    return value
