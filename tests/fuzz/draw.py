"""Cases: what a number draws."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.objectives.formula import objective_of
from srft_kernels.objectives.ratios import SHAPES

from ..srft_kernels import cases

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
    default: torch.dtype = torch.float32  # PyTorch's, while the package runs
    refilled: bool = False  # what was passed of each token is written over before the backward
    mapped: bool = False  # the result went through a tree_map, as in DDP

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
    for name in ("advantages", "rewards", "token_weight", "is_demo", "ref_logprobs"):
        if rng.random() < 0.1:
            kind = rng.choice([torch.int8, torch.int32] + [torch.uint8] * (name != "ref_logprobs"))
            columns[name] = columns[name].float().round().abs().mul(-1 if name == "ref_logprobs" else 1).to(kind)
    default = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    refilled, mapped = rng.random() < 0.3, rng.random() < 0.3
    return Case(seed, call, problem, plan, options, columns, extras, mixed, default, refilled, mapped)
