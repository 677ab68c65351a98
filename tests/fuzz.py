"""Random small calls of the loss head against fp64, for as long as you like.

    python -m tests.fuzz --minutes 5 [--seed N]       cases N, N + 1, … (N: by the clock); exit status 1 at a failure
    python -m tests.fuzz --seed N --cases 1           case N again
    python -m tests.fuzz --workers K                  K processes, each with cases of its own
    python -m tests.fuzz --backend triton             the same cases on the Triton kernels, in Triton's interpreter

A case is one call with all its gradients, drawn from its number alone: function, shapes, types, options, plan, and rows
that are random, peaked, flat, tied, huge, partly −inf (tests/srft_kernels/cases.py). Uninitialised memory is NaN.

The rule is the tests': an error against fp64 of at most twice eager PyTorch's, and a few roundings. On a handful of
numbers eager may be right by luck, so the roundings are of the largest terms that were summed, not of what their sum
left over; and where the rule is broken eager gets more chances, the same problem with its vocabulary in other orders
and, against the Triton kernels, with a tanh that is off by an ulp here and there, as a GPU's (2 ulp, says the CUDA C++
Programming Guide of tanhf).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import srft_kernels as sk
from srft_kernels.objectives.objective import objective_of
from srft_kernels.objectives.ratios import SHAPES

from .interpreter import interpret_fast
from .srft_kernels import cases
from .srft_kernels.mixed import mixed_products
from .srft_kernels.test_distillation import formula

ORDERS = 12
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    seed: int
    call: str
    problem: cases.Problem
    plan: sk.Plan | None
    options: dict[str, Any]  # of the call
    columns: dict[str, Tensor]  # annotations and upstream gradients, one number per token
    extras: sk.Extras | None = None
    mixed: bool = False  # 16-bit products with fp32 results, as on CUDA

    def __str__(self) -> str:
        p = self.problem
        shape = f"N={len(p.target)} H={p.input.shape[1]} V={len(p.weight)}"
        options = {k: v for k, v in self.options.items() if not isinstance(v, (Tensor, cases.Problem))}
        extras = "" if self.extras is None else self.extras
        return f"{self.call} {shape} {p.input.dtype} {p.head} {options} {self.plan} {extras}"


def everything(stats: sk.TokenStats, tokens: sk.Tokens) -> Tensor:
    return tokens.g * stats.logprobs + tokens.h * stats.entropy + tokens.k * stats.logsumexp


# Where a formula jumps fp32 and fp64 may stand on different sides: bounds are numbers that no probability comes near.
OBJECTIVES = {
    "everything": everything,
    "z_loss": sk.CrossEntropy(z_loss=1e-3),
    "dft": sk.dft(),
    "reinforce": sk.PolicyGradient(surrogate="reinforce", entropy_coef=0.1),
    "grpo": sk.grpo(dual_clip=3.1, max_probability=0.7391),
    "cispo": sk.cispo(),
    "sapo": sk.sapo(),
    **{f"grpo {kind}": sk.grpo(kl_coef=0.1, kl_estimator=kind) for kind in ("k1", "k2", "k3")},
    "truncate": sk.reinforce(correction=sk.Correction(low=0.6137, high=1.7351)),
    "mask": sk.grpo(correction=sk.Correction("mask", low=0.6137, high=1.7351)),
    "gspo": sk.gspo(clip_low=0.2137, clip_high=0.2751),
    "sequence_mis": sk.reinforce(correction=sk.Correction("mask", "geometric", low=0.3137, high=3.1351)),
    "luffy": sk.luffy(),
    "bounded": sk.luffy(demo_min=0.0613, demo_max=0.4337, max_probability=0.7391),
    **{f"luffy {kind}": sk.luffy(demo_shape=kind, demo_shaping=0.3, ratio_shape=kind, ratio_shaping=0.3)
       for kind in SHAPES},
    "srft_hpt": replace(sk.srft_paper(), entropy_coef=0.01),
}  # fmt: skip


def draw(seed: int, rng: random.Random | None = None, backend: str = "torch") -> Case:
    """The case of a number, or of somebody else's choices with the numbers of that number."""
    rng = rng or random.Random(seed)
    dtype = rng.choices([torch.float32, torch.bfloat16, torch.float16], [8, 2, 1])[0]
    kinds = cases.FP16_KINDS if dtype == torch.float16 else list(cases.KINDS)
    tokens, hidden = rng.choice([1, 2, 3, 5, 8]), rng.choice([1, 2, 3, 8, 16])
    vocab = rng.choice([1, 2, 3, 7, 16, 17, 33, 130])
    size = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "dtype": dtype}
    kind = rng.choice(kinds)
    problem = cases.problem(kind, **size, ignored=rng.choice([0, 0, 0.3, 0.9, 1]), seed=seed)
    if rng.random() < 0.3:
        problem = replace(problem, head={**problem.head, "temperature": rng.choice([0.25, 0.7, 1.3, 4.0])})
    plan = None
    if rng.random() < 0.8:
        chunk = rng.choice([1, 2, 3, 8])
        plan = sk.Plan(chunk_rows=chunk, block_rows=rng.randint(1, chunk), batch_invariant=rng.random() < 0.1,
                       compact=rng.choice([None, False]))  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    column = lambda: cases.grid(tokens, generator=generator) * 2  # noqa: E731
    columns = {name: column() for name in ("g", "h", "k", "token_weight", "advantages", "rewards")}
    columns["is_demo"] = column() > 0
    columns |= {name: -column().abs() for name in ("old_logprobs", "demo_logprobs", "ref_logprobs", "sampler_logprobs")}
    columns["sequence_ids"] = torch.arange(tokens) // 2
    call = rng.choice(["loss", "loss", "logprobs", "cross_entropy", "distillation"])
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        problem = replace(problem, head={**problem.head, "logit_scale": rng.choice([0.0625, 0.3, 2.5, 7.1])})
    if call != "distillation":
        if rng.random() < 0.2:
            each = cases.grid(tokens, generator=generator).abs() + 0.25
            problem = replace(problem, head={**problem.head, "temperature": each})
        count = int(problem.live.sum())
        options["live_tokens"] = rng.choice([None, count, min(count + 1, tokens)])
    if call == "loss":
        options |= {"objective": rng.choice(list(OBJECTIVES)), "weighted": rng.random() < 0.5}
        for name in ("old_logprobs", "demo_logprobs"):  # without which the data are fresh, the writer unknown
            if rng.random() < 0.5:
                del columns[name]
        local = objective_of(OBJECTIVES[options["objective"]]).scope(columns) == "token"
        plan = plan and replace(plan, passes=rng.choice([None, 1 if local else None, 2]))
    elif call == "cross_entropy":
        options |= {"reduction": rng.choice(["mean", "sum", "none"]), "z_loss": rng.choice([0.0, 1e-3])}
        if kind != "banned":
            options["label_smoothing"] = rng.choice([0.0, 0.1, 1.0])
        if rng.random() < 0.3:
            entries = problem.head.get("vocab_size", vocab)
            options["weight"] = cases.grid(entries, generator=generator).abs() + 0.125
    elif call == "distillation":
        divergence = rng.choice(["forward_kl", "reverse_kl", "jensen_shannon"])
        # of what only the student has KL(p ‖ q) is infinite, and has no gradient
        kind = rng.choice([kind for kind in kinds if kind != "banned" or divergence != "reverse_kl"])
        teacher = cases.problem(kind, **{**size, "hidden": rng.choice([1, 4])}, seed=seed + 1)
        if shared := teacher.head.get("vocab_size"):
            head, live = {**problem.head, "vocab_size": shared}, problem.live
            problem = replace(problem, head=head, target=torch.where(live, problem.target % shared, cases.IGNORED))
        options = {
            "divergence": divergence,
            "beta": rng.choice([0.1, 0.5, 0.75]),
            "teacher": teacher,
            "weighted": rng.random() < 0.3,
        }
    extras = None
    if call in ("loss", "logprobs") and kind != "gaussian" and rng.random() < 0.4:  # whose logits alone are inexact
        entries = problem.head.get("vocab_size", vocab)
        candidates = torch.randint(entries, (tokens, rng.choice([1, 3])), generator=generator)
        extras = sk.Extras(rng.random() < 0.5, rng.random() < 0.5, min(rng.choice([0, 1, 3, 64]), entries),
                           rng.choice([None, torch.where(problem.live[:, None], candidates, -7)]))  # fmt: skip
    if backend != "torch":
        plan = replace(plan or sk.Plan(), backend=backend)
    waiting = rng.choice([None, 1, 2, 20])  # chunks whose gradients are multiplied at once
    if plan is not None and waiting is not None and not plan.batch_invariant:
        plan = replace(plan, gradient_rows=waiting * plan.chunk_rows)
    mixed = rng.random() < 0.6 and problem.input.dtype.itemsize == 2
    return Case(seed, call, problem, plan, options, columns, extras, mixed)


def fused(case: Case) -> Values:
    """The outputs of live tokens and the gradients, by the package."""
    with mixed_products() if case.mixed else contextlib.nullcontext():
        return _fused(case)


def _fused(case: Case) -> Values:
    p, columns, options = case.problem, case.columns, dict(case.options)
    leaves = p.leaves()
    common = {"linear_bias": leaves[2] if len(leaves) == 3 else None, "plan": case.plan}
    if case.call != "distillation":
        common["live_tokens"] = options.pop("live_tokens")
    stats = extras = None
    if case.call == "logprobs":
        stats = sk.linear_logprobs(*leaves[:2], p.target, extras=case.extras, **common, **p.head)
        extras = stats.extras
        loss = everything(stats, sk.Tokens(p.target, **columns)).sum()
    elif case.call == "loss":
        weight = columns["token_weight"] if options["weighted"] else None
        given = {name: column for name, column in columns.items() if name != "token_weight"}
        if OBJECTIVES[options["objective"]] is not everything:  # the others refuse what they cannot read
            given = {name: column for name, column in given.items() if name not in ("g", "h", "k")}
        out = sk.linear_loss(*leaves[:2], p.target, OBJECTIVES[options["objective"]], token_weight=weight,
                             extras=case.extras, **common, **p.head, **given)  # fmt: skip
        extras = out.extras
        stats, loss = sk.TokenStats(out.logprobs, out.entropy, out.logsumexp), out.loss
    elif case.call == "cross_entropy":
        loss = sk.linear_cross_entropy(*leaves[:2], p.target, **common, **p.head, **options)
        loss = (loss * columns["g"]).sum() if options["reduction"] == "none" else loss
    else:
        teacher, weighted = options.pop("teacher"), options.pop("weighted")
        out = sk.linear_distillation(
            *leaves[:2], teacher.input, teacher.weight, teacher_bias=teacher.bias, mask=p.live,
            teacher_temperature=teacher.head.get("temperature", 1.0), teacher_softcap=teacher.head.get("softcap"),
            teacher_logit_scale=teacher.head.get("logit_scale", 1.0),
            token_weight=columns["token_weight"] if weighted else None, **common, **p.head, **options,
        )  # fmt: skip
        return _values({"divergence": out.divergence[p.live]}, out.loss, leaves)
    named = {} if stats is None else dict(zip(("logprobs", "entropy", "logsumexp"), stats.fields()))
    if extras is not None:
        named |= told(case, extras)
    return _values({name: field[p.live] for name, field in named.items()}, loss, leaves)


def told(case: Case, extras: sk.TokenExtras) -> Values:
    """The extras of all tokens as numbers that can be compared: of several equal entries any may be among the top k."""
    found = {name: field for name, field in vars(extras).items() if field is not None}
    if (ids := found.pop("top_ids", None)) is not None:
        a = raw(case.problem).gather(1, ids.clamp(min=0))
        found["top_logits"] = torch.where(ids < 0, -torch.inf, a)
        found["top_distinct"] = torch.tensor([len(set(row) - {-1}) for row in ids.tolist()])
    return {name: field if field.is_floating_point() else field.double() for name, field in found.items()}


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
    columns = {name: c[live].to(softmax) if c.is_floating_point() else c[live] for name, c in case.columns.items()}
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
        return _values({"divergence": found}, torch.where(share == 0, 0, found * share).sum(), leaves)
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
        each = g * (1 + size_of(stats.logprobs)) + h * (1 + size_of(stats.entropy)) + k * size_of(stats.logsumexp)
        each = each + smooth * (1 + size_of(stats.logprobs) + size_of(stats.smooth))
        terms |= {
            **dict.fromkeys(("logprobs", "entropy", "top_logprobs", "candidate_logprobs"), one),
            "loss": each.sum() + summed,
            **_sums(g + h * (1 + size_of(stats.logprobs)) + k + smooth, leaves, p, live),
        }
    shown = {"logprobs": named, "loss": named, "cross_entropy": {}}
    more = {} if case.extras is None else to_tell(case, z, order)
    return _values({**shown[case.call], **more}, loss, leaves)


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


def _values(named: Values, loss: Tensor, leaves: list[Tensor]) -> Values:
    grads = dict(zip(("dx", "dW", "db"), torch.autograd.grad(loss, leaves)))
    return {name: value.detach() for name, value in {**named, "loss": loss, **grads}.items()}


def failure(case: Case, run: Callable[[Case], Values] = fused) -> str | None:
    """What is wrong with the case; None: nothing."""
    found = run(case)
    if not case.problem.live.any():  # where PyTorch has NaN
        wrong = [name for name, value in found.items() if (value != 0).any()]
        return f"{wrong} of no live token are not 0" if wrong else None
    terms: Values = {}
    truth = full(case, torch.float64, torch.float64, terms=terms)
    errors = _errors(full(case, None, torch.float32), truth)
    if not (broken := _broken(found, truth, errors, terms)):
        return None
    generator = torch.Generator().manual_seed(case.seed)
    size = case.problem.head.get("vocab_size", len(case.problem.weight))
    for turn in range(ORDERS):
        order, tanh = torch.randperm(size, generator=generator), torch.tanh
        if turn % 2 and case.plan is not None and case.plan.backend == "triton":
            tanh = partial(_off_by_ulps, generator=generator)
        more = _errors(full(case, None, torch.float32, order, tanh=tanh), truth)
        errors = {name: max(error, more[name]) for name, error in errors.items()}
        if not (broken := _broken(found, truth, errors, terms)):
            return None
    return broken


def _off_by_ulps(x: Tensor, generator: torch.Generator) -> Tensor:
    """tanh x, a third of it one ulp more and a third one less, and never above 1."""
    tanh, step = x.tanh(), torch.randint(-1, 2, x.shape, generator=generator)
    with torch.no_grad():
        moved = torch.where(step == 0, tanh, torch.nextafter(tanh, step.to(tanh.dtype)))
    return tanh + (moved - tanh)


def _errors(values: Values, truth: Values) -> dict[str, float]:
    return {name: float(cases.error(values[name], truth[name])) for name in truth}


def _broken(found: Values, truth: Values, eager: dict[str, float], terms: Values) -> str | None:
    for name, error in _errors(found, truth).items():
        finite = truth[name][truth[name].isfinite()]
        magnitude = max(float(finite.abs().amax()) if finite.numel() else 0.0, float(terms.get(name, 0.0)))
        allowed = 2 * eager[name] + cases.ULPS * torch.finfo(found[name].dtype).eps * magnitude
        if not error <= allowed:
            return f"{name} is off by {error:.3g}, allowed {allowed:.3g} (eager {eager[name]:.3g}, of {magnitude:.3g})"
    return None


def poison() -> None:
    """Uninitialised memory is NaN from here on."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) * 1000, help="number of the first case")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--backend", choices=["torch", "triton"], default="torch", help="row operations")
    arguments = parser.parse_args()
    if arguments.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":  # to be set before its import
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])
    if arguments.workers > 1:
        share = arguments.cases and -(-arguments.cases // arguments.workers)
        command = [sys.executable, "-m", "tests.fuzz", "--backend", arguments.backend]
        command += ["--minutes", str(arguments.minutes)]
        command += ["--cases", str(share)] if share else []
        starts = [arguments.seed + i * (share or 10**8) for i in range(arguments.workers)]
        return max([process.wait() for process in [subprocess.Popen([*command, "--seed", str(n)]) for n in starts]])
    torch.set_num_threads(1)
    poison()
    interpret_fast()
    print(f"seed {arguments.seed}", flush=True)
    start = told = time.monotonic()
    done = 0
    while (elapsed := time.monotonic() - start) < 60 * arguments.minutes and done != arguments.cases:
        case = draw(arguments.seed + done, backend=arguments.backend)
        if message := failure(case):
            again = f"python -m tests.fuzz --backend {arguments.backend} --seed {case.seed} --cases 1"
            print(f"FAILED: {message}\n  {case}\n  {again}")
            return 1
        done += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{done} cases, {done / elapsed:.0f}/s", flush=True)
    print(f"{done} cases passed in {elapsed:.0f} s, {done / max(elapsed, 1e-9):.0f}/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
