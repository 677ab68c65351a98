"""From `loss.preset` and `loss.options` to an objective of `srft_kernels`, checked before anything is loaded."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import srft_kernels as sk
from srft.config import LossConfig
from srft.errors import UserError, nearest
from srft.settings import words
from srft_kernels.objectives import Objective

# What the trainer tells the loss about every token; the last where the objective asks for it
GIVEN = ("advantages", "rewards", "is_demo", "sequence_ids", "ref_logprobs")


def build_objective(config: LossConfig) -> Objective:
    """The objective that the configuration names; raises UserError for what is none, and what this trainer cannot give.

    Options are fields of the objective, or arguments of the preset's own (chord's mu).
    """
    presets = [name for name in sk.presets.__dict__ if callable(getattr(sk, name, None)) and name.islower()]
    if config.preset not in presets:
        raise UserError(
            f"loss.preset: expected one of {', '.join(presets)}, found {config.preset!r}"
            f"{nearest(config.preset, presets)}"
        )
    preset = getattr(sk, config.preset)
    known = option_types(preset)
    for name, value in config.options.items():
        if name not in known:
            options = f"(options of {config.preset}: {', '.join(known)})"
            raise UserError(f"loss.options.{name}: unknown option{nearest(name, known)} {options}")
        if not fits(value, known[name]):
            raise UserError(f"loss.options.{name}: expected {words(kinds(known[name])[0])}, found {value!r}")
    try:
        objective = preset(**config.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss.options for {config.preset}: {error}") from error
    if unknown := [name for name in objective.requires(GIVEN) if name not in GIVEN]:
        raise UserError(
            f"loss.options for {config.preset}: the objective needs {', '.join(unknown)}, which srft train does not "
            "compute; leave out the option that asks for it"
        )
    return objective


def refers(objective: Objective) -> bool:
    """Does it need the log-probs of a reference?"""
    return "ref_logprobs" in objective.requires(GIVEN)


def option_types(preset: Callable[..., Any]) -> dict[str, Any]:
    """{name: type} of the fields of the dataclass that `preset` returns, and of its own arguments."""
    own = typing.get_type_hints(preset)
    kind = own.pop("return")
    own.pop("options", None)  # **options: the fields
    hints = typing.get_type_hints(kind)
    return own | {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def kinds(hint: Any) -> tuple[type, ...]:
    """`float | None` → (float, NoneType); float → (float,)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """A value of that type; whole numbers are numbers, true and false are not."""
    if type(value) is float:
        return float in kinds(hint) and math.isfinite(value)
    return type(value) in kinds(hint) or (type(value) is int and float in kinds(hint))
