"""Forward and backward of one step's sequences: packed into rows, with prompts shared or not, and padded.

A group of prompts with as many completions each, of 16 to 512 tokens (srft/learn/packing.py), on a Llama with random
weights, in microbatches of as many tokens. Needs torch and transformers.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import srft_kernels as sk

from . import memory
from .cases import Case, Shape
from .inputs import make
from .measure import EVERYONE, Limits, Row, attempt, default_dtype, description, peaks, release, stage, time_all
from .providers import OURS, PADDED, UNSHARED
from .step import MODELS, packages, right
from .timing import kind_of

if TYPE_CHECKING:
    from srft.learn.packing import Sequence

# A backbone beside which the head is small, as it is in a model of billions; that of the training step has two layers.
LLAMAS = {
    "cpu": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096},
    "cuda": MODELS["cuda"],
}
PROMPTS, COMPLETIONS = {"cpu": 4, "cuda": 8}, {"cpu": 5, "cuda": 9}
LENGTHS = 16, 512
BUDGETS = {"cpu": 2048, "cuda": 16384}  # tokens per microbatch
NAMES = (OURS.name, UNSHARED, PADDED)


def packing_case(device: str) -> Case:
    kind = kind_of(device)
    shape = Shape(0, LLAMAS[kind]["hidden_size"], LLAMAS[kind]["vocab_size"])
    note = (
        f"forward and backward of {PROMPTS[kind]} × {COMPLETIONS[kind]} completions of {LENGTHS[0]} to {LENGTHS[1]} "
        f"tokens, {BUDGETS[kind]} in a microbatch; × products and TFLOP/s: of the head alone"
    )
    return Case("packed rows", "srft", shape, "random", note=note)


def sequences(kind: str) -> list[Sequence]:
    """Of a step, with prompts of 16 to 128 tokens; the last of each group is the demonstration."""
    from srft.learn.packing import Sequence

    chance = random.Random(0)

    def text(length: int) -> list[int]:
        return [chance.randrange(1, LLAMAS[kind]["vocab_size"]) for _ in range(length)]

    found = []
    for _ in range(PROMPTS[kind]):
        prompt = text(chance.randint(16, 128))
        for number in reversed(range(COMPLETIONS[kind])):
            lengths, right = chance.randint(*LENGTHS), float(number % 2)
            found.append(Sequence(prompt, text(lengths), number == 0, right, 0.5 - right))
    return found


def update(model: Any, of_step: list[Sequence], rows: Any, budget: int) -> tuple[float, float]:
    """(loss, norm of its gradient)"""
    from srft.learn.packing import pack, predictors
    from srft.model import head_of

    model.zero_grad()
    total = 0.0
    for m in pack(of_step, token_budget=budget, device=model.device, rows=rows):
        out = sk.linear_loss(
            predictors(model, m), target=m.target, objective=sk.srft_paper(), **head_of(model), **m.annotations
        )
        out.loss.backward()
        total += float(out.loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return total, float(torch.nn.utils.get_total_norm(grads))


def measure_packing(
    device: str,
    rounds: int | None = None,
    limits: Limits | None = None,
    begin: Callable[[str], None] = lambda provider: None,
    left_out: Collection[str] = (),
) -> list[Row]:
    """A row for each way, as `measure.measure`: errors of loss and gradient norm against fp64, one sequence a row."""
    kind, dtype, limits = kind_of(device), default_dtype(device), limits or Limits()
    case, budget = packing_case(device), BUDGETS[kind]
    begin(EVERYONE)
    with stage("model and sequences", device), packages():
        from srft.model import Rows
        from srft.model.rows import try_rows
        from tests.srft.conftest import tiny_model

        of_step = sequences(kind)
        ways = dict(zip(NAMES, (Rows(packed=True, shared=True), Rows(packed=True), Rows())))
        model = tiny_model(**LLAMAS[kind]).to(device, torch.float64)
    with stage("truth in fp64", device):
        exact = update(model, of_step, ways[PADDED], budget // 2)
        model.to(dtype)
        assert try_rows(model).shared
    release(device)
    tokens = sum(len(each.completion) for each in of_step)
    counted = replace(case, shape=Shape(tokens, case.shape.hidden, case.shape.vocab))
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[..., Any]] = {}
    for name, way in ways.items():
        if name in left_out:
            continue
        row = rows[name] = Row(case, name, "ok", extra=description(counted, dtype) | {"case": str(case)})
        begin(name)
        with attempt(row, device, limits):
            limits.check(name)

            def call(_: Any, way: Rows = way) -> Any:
                return update(model, of_step, way, budget)

            found = call(None)
            errors = {what: abs(a / b - 1) for what, a, b in zip(("loss", "grad_norm"), found, exact)}
            if right(row, errors, dtype):
                row.extra |= peaks(memory.peak_bytes(lambda: call(None), device), 0, device)
                calls[name] = call
        release(device)
    begin(EVERYONE)
    with stage("inputs of the floor", device):
        inputs = make(counted, device, dtype)
    time_all(counted, rows, calls, inputs, device, rounds)
    for row in rows.values():
        if row.seconds:
            middle = statistics.median(row.seconds)
            row.extra |= {"tflops": counted.flops / middle / 1e12, "tokens_per_second": tokens / middle}
    return list(rows.values())
