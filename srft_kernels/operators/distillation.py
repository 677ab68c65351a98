"""The operator of distillation, srft_kernels::distillation: loss, divergences, gradients. See loss.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..distillation.engine import distillation_pass
from ..head import accumulation_dtype
from .common import (
    SCHEMA,
    autocast,
    call_of,
    define,
    eagerly,
    empty_gradients,
    finished,
    keep_gradients,
    scale_gradients,
)


def _distillation(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    with eagerly(compiled):
        tensors, call = compiled.arguments.prepared()
        loss, divergences, gradients, scale = distillation_pass(tensors, compiled.needs_grad, call)
        values = finished(gradients, compiled, rounded=scale is None).values()
        scale = loss.new_ones(()) if scale is None else scale
        return [loss, call.batch.spread(divergences), scale, *values]


def _fake_distillation(*arguments: Any) -> list[Tensor]:
    compiled = call_of(*arguments)
    a = compiled.arguments
    with autocast(compiled):
        compute, *_ = a.checked()
    loss = a.input.new_empty((), dtype=accumulation_dtype(compute))
    divergences, scale = loss.new_empty(a.input.shape[:-1]), loss.new_empty(())
    return [loss, divergences, scale, *empty_gradients(compiled, compute).values()]


define(f"distillation({SCHEMA}) -> Tensor[]", _distillation, _fake_distillation, keep_gradients, scale_gradients)
