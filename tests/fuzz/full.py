"""A case with full logits and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import srft_kernels as sk

from ..srft_kernels import cases
from ..srft_kernels.test_distillation import formula
from .draw import OBJECTIVES, Case, Values, everything


def full(
    case: Case,
    dtype: torch.dtype | None,
    softmax: torch.dtype,
    order: Tensor | None = None,
    terms: Values | None = None,
    tanh: Callable = torch.tanh,
) -> Values:
    """The same with full logits and autograd.

    order   that of the vocabulary inside
    tanh    of the soft cap
    terms   filled with the size of the terms that each result is the sum of
    """
    p, options, live = case.problem, case.options, case.problem.live
    size = p.head.get("vocab_size", len(p.weight))
    order = torch.arange(size) if order is None else order
    leaves = p.leaves(dtype)
    target = order.argsort()[p.target[live]]
    z = logits(p, leaves, order, softmax, tanh)[live]
    kinds = {"is_demo": torch.bool, "sequence_ids": torch.int64}
    columns = {name: c[live].to(kinds.get(name, softmax)) for name, c in case.columns.items()}
    count = max(int(live.sum()), 1)
    if case.call == "distillation":
        teacher = options["teacher"]
        with torch.no_grad():
            other = logits(teacher, teacher.leaves(dtype), order, softmax, tanh)[live]
        log_p, log_q = z.log_softmax(-1), other.log_softmax(-1)
        found = formula(options["divergence"], options["beta"], log_p, log_q)
        share = columns["token_weight"] if options["weighted"] else torch.full_like(log_p[:, 0], 1 / count)
        if terms is not None:
            ratio = sum(
                log.detach().nan_to_num(0, 0, 0).abs() for log in (log_p, log_q)
            )  # what log p − log q is made of
            weight = log_p.exp() if options["divergence"] == "reverse_kl" else log_q.exp()
            each = 1 + (weight.detach() * ratio).sum(-1)  # and of the logarithms of sums that are at least 1
            each_share = each * share.abs()
            terms |= {"divergence": each.amax(), "loss": each_share.sum(), **_sums(each_share, leaves, p, live)}
        return values({"divergence": found}, torch.where(share == 0, 0, found * share).sum(), leaves)
    stats = sk.reference.token_stats(z, target)
    loss = smooth = summed = 0
    if case.call == "cross_entropy":
        weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
        loss = F.cross_entropy(z, target, None if weight is None else weight[order].to(softmax),
                               reduction=options["reduction"], label_smoothing=smoothing)  # fmt: skip
        share = columns["g"] if options["reduction"] == "none" else torch.ones_like(columns["g"])
        if options["reduction"] == "mean":
            share = share / (count if weight is None else weight[order][target].sum())
        smooth = 2 * share.abs()  # of −ℓ and the smoothing, with class weights up to 9/8
        if options["reduction"] == "none":
            loss = (loss * share).sum()
        loss = loss + (options["z_loss"] * stats.logsumexp.square() * share).sum()
    elif case.call == "logprobs":
        loss = everything(stats, sk.Tokens(target, **columns)).sum()
    else:
        share = columns["token_weight"] if options["weighted"] else 1 / count
        if options["weighted"]:
            columns["counted"] = share != 0
        parts = [part(stats, sk.Tokens(target, **columns)) * share for part in _parts(OBJECTIVES[options["objective"]])]
        losses = [part.sum() for part in parts]
        loss = sum(losses)
        summed = sum(part.detach().nan_to_num(0, 0, 0).abs().sum() for part in parts)  # not 0 where a slope is: a clip
    named = {"logprobs": stats.logprobs, "entropy": stats.entropy, "logsumexp": stats.logsumexp}
    if terms is not None:
        g = h = k = torch.zeros_like(stats.logprobs)
        for part in [loss] if case.call != "loss" else losses:
            coefs = torch.autograd.grad(part, list(named.values()), retain_graph=True, allow_unused=True)
            g, h, k = (size if c is None else size + c.abs() for size, c in zip((g, h, k), coefs))
        size_of = lambda field: field.detach().nan_to_num(0, 0, 0).abs()  # noqa: E731
        one = torch.ones(())  # ℓ and H have the logarithm of a sum in them that is at least 1
        # a loss's slopes have ratios and weights in them, e to the power of what is as exact as ℓ; past 20 those are 0
        steep = 1 + size_of(stats.logprobs).clamp(max=20) if case.call == "loss" else 1
        each = g * (1 + size_of(stats.logprobs)) + h * (1 + size_of(stats.entropy)) + k * size_of(stats.logsumexp)
        each = each + smooth * (1 + size_of(stats.logprobs) + size_of(stats.smooth))
        highest = size_of(z.nan_to_num(0, 0, 0)).max()
        terms |= {
            # a difference of logits, each of them rounded: one ulp of the largest
            **dict.fromkeys(("logprobs", "entropy", "top_logprobs", "candidate_logprobs"), one + highest / cases.ULPS),
            "logsumexp": one + size_of(z.amax(-1)).max(),  # a maximum and the logarithm of a sum may leave little
            "loss": each.sum() + summed,
            **_sums(g * steep + h * (1 + size_of(stats.logprobs)) + k + smooth, leaves, p, live),
            "slopes": torch.stack([g, h, k]),
        }
    shown = {"logprobs": named, "loss": named, "cross_entropy": {}}
    more = {} if case.extras is None else to_tell(case, z, order)
    return values({**shown[case.call], **more}, loss, leaves)


def _parts(objective: Callable) -> list[Callable]:
    """Objectives whose losses sum to this one's: the two terms of a demonstration may leave little of each other."""
    if getattr(objective, "kl_coef", 0):
        kl = lambda stats, tokens: objective.kl_coef * objective._kl(stats, tokens)  # noqa: E731
        return [replace(objective, kl_coef=0.0), kl]
    if not isinstance(objective, sk.SRFT):
        return [objective]
    others = {"rollout_coef": 0.0, "negative_coef": 0.0, "entropy_coef": 0.0}
    return [replace(objective, demo_rl_coef=0.0), replace(objective, demo_sft_coef=0.0, **others)]


def _sums(size: Tensor, leaves: list[Tensor], p: cases.Problem, live: Tensor) -> Values:
    """Sizes of the sums behind dx, dW and db, where each token's logits have a gradient of some size (n,)."""
    temperature = p.head.get("temperature", 1.0)
    temperature = temperature[live] if isinstance(temperature, Tensor) else temperature
    size = size * p.head.get("logit_scale", 1.0) / temperature
    x, w = (leaf.detach().nan_to_num(0, 0, 0).abs() for leaf in leaves[:2])
    lanes = 16  # equal terms round the same way, each time that one is added
    return {
        "dx": size.max() * w.max() * (1 + len(w) / lanes),
        "dW": (size[:, None] * x[live]).sum(0).max(),
        "db": size.sum(),
    }


def logits(
    p: cases.Problem, leaves: list[Tensor], order: Tensor, softmax: torch.dtype, tanh: Callable = torch.tanh
) -> Tensor:
    z = F.linear(leaves[0], leaves[1][order], leaves[2][order] if len(leaves) == 3 else None).to(softmax)
    return cases.scored(z, p.head, tanh)


def values(named: Values, loss: Tensor, leaves: list[Tensor]) -> Values:
    grads = dict(zip(("dx", "dW", "db"), torch.autograd.grad(loss, leaves)))
    return {name: value.detach() for name, value in {**named, "loss": loss, **grads}.items()}


def to_tell(case: Case, z: Tensor, order: Tensor) -> Values:
    """The same for the live tokens, from their logits z (n, V) in an order of the vocabulary."""
    asked, p = case.extras, case.problem
    a, log_p, found = raw(p)[p.live], z.detach().log_softmax(-1), {}
    if asked.rank:
        found["rank"] = (a > a.gather(1, p.target[p.live, None])).sum(-1).double()
    if asked.argmax:
        found["argmax"] = a.argmax(-1).double()
    if asked.top_k:
        top = found["top_logits"] = a.topk(asked.top_k).values
        found["top_distinct"] = top.isfinite().sum(-1).double()
        found["top_logprobs"] = log_p.topk(asked.top_k).values
    if asked.candidates is not None:
        found["candidate_logprobs"] = log_p.gather(1, order.argsort()[asked.candidates[p.live]])
    return found


def raw(p: cases.Problem) -> Tensor:
    """Logits before scale, cap and temperature, exact in fp64."""
    size = p.head.get("vocab_size", len(p.weight))
    bias = None if p.bias is None else p.bias[:size].double()
    return F.linear(p.input.double(), p.weight[:size].double(), bias)
