"""The public functions as Dynamo traces them: one operator a call, found again by name among its results.

An objective of the caller's own is traced too, on n-long vectors, between an operator and its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import (
    checks,
    functional,
    operators,  # noqa: F401  defines those of torch.ops
)
from .distillation import DistillationArguments, DistillationOutput
from .engine import weighted_loss
from .extras import Extras, TokenExtras
from .objectives import CrossEntropy
from .options import (
    EXTRAS,
    STATISTICS,
    TEACHING,
    DistillationOptions,
    Options,
    encoded,
    in_one_pass,
    metric_names,
    result_names,
)
from .output import LossOutput
from .pack import pack
from .prepare import Arguments, Tensors
from .tokens import Tokens, TokenStats, token_local


def linear_loss(a: Arguments) -> LossOutput:
    if not supported(a):
        return _loss_apart(a)
    if type(a.objective) not in checks.BUILT_IN:
        return _traced_loss(a)
    call = _call(a, "loss", a.objective, a.annotations)
    found = _found(call)

    def metrics() -> dict[str, Tensor]:
        names = metric_names(call[-1])
        if not names:
            return {}
        statistics = [found[name] for name in STATISTICS if name in found]
        values = torch.ops.srft_kernels.metrics(statistics, found.get("argmax"), found.get("filtered"), *call)
        return dict(zip(names, values.unbind()))

    return LossOutput(found["loss"], *[found[name] for name in STATISTICS[:3]], _token_extras(a, found), metrics)


def linear_logprobs(a: Arguments) -> TokenStats:
    if not supported(a):
        return _statistics_apart(a)
    found = _found(_call(a, "statistics", None, {}))
    return TokenStats(*[found[name] for name in STATISTICS[:3]], extras=_token_extras(a, found))


def linear_cross_entropy(a: Arguments) -> Tensor:
    if not supported(a):
        return _cross_entropy_apart(a)
    made = "losses" if a.reduction == "none" else "loss"
    return _found(_call(a, made, a.objective, {}))[made]


def linear_distillation(a: DistillationArguments) -> DistillationOutput:
    teaching = {name: getattr(a, name) for name in TEACHING}
    _check_tensors(
        {"input": a.input, "linear_weight": a.linear_weight, "linear_bias": a.linear_bias, **teaching},
        optional=("linear_bias", "teacher_bias", "mask", "token_weight"),
    )
    options = DistillationOptions(**_around(a.tensors), arguments=a)
    constants = [None if value is None else value.detach() for value in teaching.values()]
    loss, divergence, *_ = torch.ops.srft_kernels.distillation(*a.tensors, *constants, encoded(options))
    return DistillationOutput(loss, divergence)


def supported(a: Arguments) -> bool:
    """Whether a call can be part of a graph; where not, the eager function runs between two graphs."""
    if a.group is not None or a.token_group is not None or a.weight_grad is not None:
        return False
    if a.objective is None or type(a.objective) in checks.BUILT_IN:
        return True
    # of tokens whose number is known only at run time, an objective that is traced cannot see the live ones alone
    sees_all = token_local(a.objective, a.annotations) or getattr(a.objective, "reads_live", False)
    return (sees_all or a.ignore_index is None) and not hasattr(a.objective, "metrics")


def _apart(function: Any) -> Any:
    return torch.compiler.disable(
        function,
        reason="srft_kernels runs outside of a graph what it cannot compile: calls with group=, token_group= or "
        "weight_grad=, and objectives of your own that have metrics, or see several tokens without reads_live = True",
    )


_loss_apart, _statistics_apart, _cross_entropy_apart = map(
    _apart, (functional.loss_of, functional.statistics_of, functional.cross_entropy_of)
)


def _traced_loss(a: Arguments) -> LossOutput:
    """An objective of the caller's, traced on all tokens, ignored ones with weight 0: in two passes."""
    checks.annotations_needed(a.objective, a.annotations)
    smoothing = getattr(a.objective, "label_smoothing", 0)
    call = _call(a, "statistics", CrossEntropy(label_smoothing=smoothing) if smoothing else None, {})
    found = _found(call)
    stats = TokenStats(*[found[name].reshape(-1) for name in STATISTICS if name in found])
    dtype = stats.logprobs.dtype
    columns = {}
    for name, value in a.annotations.items():
        value = checks.shaped_like_target(name, value, a.target).reshape(-1)
        columns[name] = value.to(dtype) if value.is_floating_point() else value
    target, live = a.target_and_live()
    weight = a.token_weight
    if weight is not None:
        weight = checks.shaped_like_target("token_weight", weight, a.target).reshape(-1).to(dtype)
    tokens, live = Tokens(target.reshape(-1), **columns), None if live is None else live.reshape(-1)
    rows, _ = pack(tokens, live, weight, a.objective, dtype, None, compact=False)
    loss = weighted_loss(a.objective, stats, rows)
    extras = _token_extras(a, found)

    def metrics() -> dict[str, Tensor]:
        if extras is None or extras.argmax is None:
            return {}
        right = extras.argmax.reshape(-1) == target.reshape(-1)
        count = right.numel() if live is None else live.sum()
        return {"accuracy": (right if live is None else right & live).sum().to(dtype) / count}

    return LossOutput(loss, *[found[name].detach() for name in STATISTICS[:3]], extras, metrics)


def _call(a: Arguments, made: str, objective: Any, annotations: dict[str, Tensor]) -> tuple[Any, ...]:
    """The arguments of an operator."""
    beside = {"temperature": a.temperature if isinstance(a.temperature, Tensor) else None,
              "token_weight": a.token_weight, "weight": a.class_weight}  # fmt: skip
    named = {"input": a.input, "linear_weight": a.linear_weight, "linear_bias": a.linear_bias, "target": a.target}
    candidates = a.extras.candidates if isinstance(a.extras, Extras) else None
    _check_tensors({**named, **beside, "candidates": candidates, **annotations}, ("linear_bias", "candidates", *beside))
    options = Options(
        **_around(a.tensors),
        made=made,
        annotations=tuple(annotations),
        candidates=candidates is not None,
        objective=objective,
        temperature=None if isinstance(a.temperature, Tensor) else a.temperature,
        softcap=a.softcap,
        logit_scale=a.logit_scale,
        ignore_index=a.ignore_index,
        vocab_size=a.vocab_size,
        reduction=a.reduction,
        plan=a.plan,
        extras=a.extras,
    )
    return (
        *(a.input, a.linear_weight, a.linear_bias, a.target),
        *[None if value is None else value.detach() for value in beside.values()],
        candidates,
        [value.detach() for value in annotations.values()],
        a.live_tokens,
        encoded(options),
    )


def _check_tensors(given: dict[str, Any], optional: tuple[str, ...]) -> None:
    for name, value in given.items():
        if value is not None or name not in optional:
            checks.tensor(name, value)


def _around(tensors: Tensors) -> dict[str, Any]:
    """What `Around` tells."""
    grad, kind = torch.is_grad_enabled(), tensors[0].device.type
    autocast = None
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        autocast = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    wanted = tuple([grad and tensor is not None and tensor.requires_grad for tensor in tensors])
    return {"wanted": wanted, "autocast": autocast}


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # which torch 2.11 cannot trace


def _found(call: tuple[Any, ...]) -> dict[str, Tensor]:
    """What the operator that is right for a call makes, by name."""
    options, kind = call[-1], call[0].device.type
    if in_one_pass(options, kind):
        return dict(zip(result_names(options, True), torch.ops.srft_kernels.one_pass(*call)))
    return dict(zip(result_names(options, False), torch.ops.srft_kernels.two_pass(*call)))


def _token_extras(a: Arguments, found: dict[str, Tensor]) -> TokenExtras | None:
    if a.extras is None:
        return None
    return TokenExtras(**{name: found[name] for name in EXTRAS if name in found})
