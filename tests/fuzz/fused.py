"""A case by the package."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import srft_kernels as sk

from ..srft_kernels.mixed import mixed_products
from .draw import OBJECTIVES, Case, Values, everything
from .full import raw, values


def fused(case: Case) -> Values:
    """The outputs of live tokens and the gradients, by the package."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(case.default)
        with mixed_products() if case.mixed else contextlib.nullcontext():
            return _fused(case)
    except RuntimeError as error:
        if case.refilled and "modified by an inplace operation" in str(error):
            return fused(replace(case, refilled=False))
        raise
    finally:
        torch.set_default_dtype(default)


def _fused(case: Case) -> Values:
    p, columns, options = case.problem, case.columns, dict(case.options)
    leaves, y = p.leaves(), p.target.clone()
    head = {name: value.clone() if isinstance(value, Tensor) else value for name, value in p.head.items()}
    common = {"linear_bias": leaves[2] if len(leaves) == 3 else None, "plan": case.plan}
    if case.call != "distillation":
        common["live_tokens"] = options.pop("live_tokens")
    stats = extras = None
    if case.call == "logprobs":
        stats = after(case, sk.linear_logprobs(*leaves[:2], y, extras=case.extras, **common, **head), y, head)
        extras = stats.extras
        loss = everything(stats, sk.Tokens(p.target, **columns)).sum()
    elif case.call == "loss":
        weight = columns["token_weight"] if options["weighted"] else None
        weight = weight if weight is None else weight.clone()
        given = {name: column.clone() for name, column in columns.items() if name != "token_weight"}
        if OBJECTIVES[options["objective"]] is not everything:  # the others refuse what they cannot read
            given = {name: column for name, column in given.items() if name not in ("g", "h", "k")}
        out = sk.linear_loss(*leaves[:2], y, OBJECTIVES[options["objective"]], token_weight=weight,
                             extras=case.extras, **common, **head, **given)  # fmt: skip
        out = after(case, out, y, {**head, **given, "token_weight": weight})
        extras = out.extras
        stats, loss = sk.TokenStats(out.logprobs, out.entropy, out.logsumexp), out.loss
    elif case.call == "cross_entropy":
        loss = after(case, sk.linear_cross_entropy(*leaves[:2], y, **common, **head, **options), y, head)
        loss = (loss * columns["g"]).sum() if options["reduction"] == "none" else loss
    else:
        teacher, weighted = options.pop("teacher"), options.pop("weighted")
        out = sk.linear_distillation(
            *leaves[:2], teacher.input, teacher.weight, teacher_bias=teacher.bias, mask=p.live,
            teacher_temperature=teacher.head.get("temperature", 1.0), teacher_softcap=teacher.head.get("softcap"),
            teacher_logit_scale=teacher.head.get("logit_scale", 1.0),
            token_weight=columns["token_weight"] if weighted else None, **common, **p.head, **options,
        )  # fmt: skip
        out = after(case, out, y, {})
        return values({"divergence": out.divergence[p.live]}, out.loss, leaves)
    named = {} if stats is None else dict(zip(("logprobs", "entropy", "logsumexp"), stats.fields()))
    if extras is not None:
        named |= told(case, extras)
    return values({name: field[p.live] for name, field in named.items()}, loss, leaves)


def after(case: Case, out: Any, target: Tensor, others: dict[str, Any]) -> Any:  # (n,)
    """A result, once its targets and what else was passed of each token has been written over, and it was mapped."""
    if case.refilled:
        for buffer in (target, *(value for value in others.values() if isinstance(value, Tensor))):
            buffer.copy_(buffer.flip(0))
    return pytree.tree_map(lambda leaf: leaf.view_as(leaf), out) if case.mapped else out


def told(case: Case, extras: sk.TokenExtras) -> Values:
    """The extras of all tokens as numbers that can be compared: of several equal entries any may be among the top k."""
    found = {name: field for name, field in vars(extras).items() if field is not None}
    if (ids := found.pop("top_ids", None)) is not None:
        a = raw(case.problem).gather(1, ids.clamp(min=0))
        found["top_logits"] = torch.where(ids < 0, -torch.inf, a)
        found["top_distinct"] = torch.tensor([len(set(row) - {-1}) for row in ids.tolist()])
    return {name: field if field.is_floating_point() else field.double() for name, field in found.items()}
