"""The public functions as Dynamo traces them: one operator a call, whose results are found again by name.

An objective of the caller's own is traced too, on n-long vectors, between an operator and its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import checks, engine
from ..batch import select
from ..call import OPTIONS, Arguments
from ..distillation.engine import DistillationArguments, DistillationOutput
from ..engine import weighted_loss
from ..extras import TokenExtras
from ..objectives.cross_entropy import CrossEntropy
from ..objectives.objective import Tokens, TokenStats, annotation, check_annotations
from ..output import LossOutput
from .constants import CompiledCall, encoded
from .definitions import STATISTICS, in_one_pass, metric_names, result_names


def linear_loss(a: Arguments) -> LossOutput:
    if not supported(a):
        return _loss_apart(a)
    if a.objective.twin is None:
        return _traced_loss(a)
    operands = _operands(a, "loss")
    results = _run(operands)
    statistics = [results[name] for name in STATISTICS if name in results]
    return LossOutput(results["loss"], *statistics[:3], _extras(a, results), _metrics(operands, statistics, results))


def _metrics(operands: tuple[Any, ...], statistics: list[Tensor], results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Made in the graph, where nobody has written over what they are made of; left out of it if nobody reads them."""
    names = metric_names(operands[-1])
    if not names:
        return {}
    values = torch.ops.srft_kernels.metrics(statistics, results.get("argmax"), results.get("filtered"), *operands)
    return dict(zip(names, values.unbind()))


def linear_logprobs(a: Arguments) -> TokenStats:
    if not supported(a):
        return _statistics_apart(a)
    results = _run(_operands(a, "statistics"))
    return TokenStats(*[results[name] for name in STATISTICS[:3]], extras=_extras(a, results))


def linear_cross_entropy(a: Arguments) -> Tensor:
    if not supported(a):
        return _cross_entropy_apart(a)
    result = "losses" if a.reduction == "none" else "loss"
    return _run(_operands(a, result))[result]


def linear_distillation(a: DistillationArguments) -> DistillationOutput:
    return DistillationOutput(*torch.ops.srft_kernels.distillation(*_operands(a, "divergence"))[:2])


def supported(a: Arguments) -> bool:
    """Whether a call can be part of a graph; where not, the eager function runs between two graphs."""
    if a.group is not None or a.token_group is not None or a.weight_grad is not None:
        return False
    if a.objective is None or a.objective.twin is not None:
        return True
    # of tokens whose number is known only at run time, an objective that is traced cannot see the live ones alone
    sees_all = a.objective.scope(a.annotations) == "token" or a.objective.reads_live
    return (sees_all or a.ignore_index is None) and not a.objective.has_metrics


def _apart(function: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    return torch.compiler.disable(
        function,
        reason="srft_kernels runs outside of a graph what it cannot compile: calls with group=, token_group= or "
        "weight_grad=, and objectives of your own that have metrics, or see several tokens without reads_live = True",
    )


_loss_apart, _statistics_apart, _cross_entropy_apart = map(
    _apart, (engine.linear_loss, engine.linear_logprobs, engine.linear_cross_entropy)
)


def _traced_loss(a: Arguments) -> LossOutput:
    """An objective of the caller's, traced on all tokens, ignored ones with weight 0: in two passes."""
    check_annotations(a.objective, a.annotations, OPTIONS)
    smoothing = a.objective.label_smoothing
    statistics = CrossEntropy(label_smoothing=smoothing) if smoothing else None
    results = _run(_operands(replace(a, objective=statistics, annotations={}, token_weight=None), "statistics"))
    stats = TokenStats(*[results[name].reshape(-1) for name in STATISTICS if name in results])
    dtype = stats.logprobs.dtype
    columns = {}
    for name, value in a.annotations.items():
        checks.shaped_like(name, value, a.target)
        columns[name] = annotation(name, value.detach().reshape(-1), dtype)
    target, live = a.target_and_live()
    weight = a.token_weight
    if weight is not None:
        checks.shaped_like("token_weight", weight, a.target)
        weight = weight.detach().reshape(-1).to(dtype)
    tokens, live = Tokens(target.reshape(-1), **columns), None if live is None else live.reshape(-1)
    batch = select(tokens, live, weight, a.objective, dtype, shape=target.shape, compact=False)
    loss = weighted_loss(a.objective, stats, batch)
    extras = _extras(a, results)
    metrics = {}
    if extras is not None and extras.argmax is not None:
        right = extras.argmax.reshape(-1) == target.reshape(-1)
        count = right.numel() if live is None else live.sum()
        metrics = {"accuracy": (right if live is None else right & live).sum().to(dtype) / count}
    return LossOutput(loss, *[results[name].detach() for name in STATISTICS[:3]], extras, metrics)


def _operands(a: Arguments | DistillationArguments, result: str) -> tuple[Any, ...]:
    """What an operator takes of a call."""
    for name, tensor in zip(("input", "linear_weight", "linear_bias"), a.tensors):
        if tensor is not None or name != "linear_bias":
            checks.tensor(name, tensor)
            checks.untransformed(name, tensor)
    grad, device = torch.is_grad_enabled(), a.input.device.type
    if not isinstance(getattr(a, "live_tokens", None), (int, torch.SymInt, type(None))):
        raise TypeError("live_tokens must be an int of Python in a compiled call, or a symbolic one: pass int(...)")
    autocast = None
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    needs_grad = tuple([grad and tensor is not None and tensor.requires_grad for tensor in a.tensors])
    tensors: list[Tensor] = []
    constants = encoded(CompiledCall(a, result, needs_grad, autocast), "the call", "CompiledCall", tensors)
    others = tensors[sum(tensor is not None for tensor in a.tensors) :]  # x, W and b are the first fields
    return *a.tensors, others, a.live_tokens if isinstance(a, Arguments) else None, constants


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # which torch 2.11 cannot trace


def _run(operands: tuple[Any, ...]) -> dict[str, Tensor]:
    """The results of the operator that is right for a call, by name."""
    constants, device = operands[-1], operands[0].device.type
    if in_one_pass(constants, device):
        return dict(zip(result_names(constants, True), torch.ops.srft_kernels.one_pass(*operands)))
    return dict(zip(result_names(constants, False), torch.ops.srft_kernels.two_pass(*operands)))


def _extras(a: Arguments, results: dict[str, Tensor]) -> TokenExtras | None:
    if a.extras is None:
        return None
    names = TokenExtras.__dataclass_fields__
    return TokenExtras(**{name: results[name] for name in names if name in results})
