"""Distillation on hidden states: the divergence between a student's head and a teacher's, without the logits of either.

Both heads' logits are made for one chunk of tokens at a time, and the gradient to the student while they are there:
2NV(3 H_student + H_teacher) flops with all gradients. The teacher is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..batch import select
from ..call import Call, HeadArguments, Tensors
from ..engine import Gradients, OnePass, fp16_scale, plain_matmul
from ..head import Head, HeadProducts, accumulation_dtype
from ..objectives.objective import Objective, Tokens, weighted
from ..plan import Plan
from ..trees import node
from .divergence import DIVERGENCES, Divergence, DivergenceRows


@node
@dataclass(frozen=True)
class DistillationOutput:
    """What `linear_distillation` returns.

    loss        scalar, Σ_t token_weight_t · divergence_t; differentiable
    divergence  of each token in nats, shaped like mask, detached; 0 where masked
    """

    loss: Tensor
    divergence: Tensor


# What an option of a head is called where it is the teacher's: teacher_weight, teacher_softcap, …
OF_TEACHER = {f"teacher_{option.name.removeprefix('linear_')}": option.name for option in fields(HeadArguments)}


@dataclass(frozen=True, kw_only=True)
class DistillationArguments(HeadArguments):
    """Those of `linear_distillation`, by their names there; the teacher's are a head's of its own."""

    teacher: HeadArguments
    divergence: str = "forward_kl"
    beta: float = 0.5
    vocab_size: int | None = None
    mask: Tensor | None = None  # (...)
    token_weight: Tensor | None = None  # (...)
    plan: Plan | None = None

    @classmethod
    def of(cls, passed: dict[str, Any]) -> DistillationArguments:
        """From what `linear_distillation` was passed, by name."""
        passed = dict(passed)
        if passed.pop("group", None) is not None:
            raise ValueError(
                "linear_distillation(group=...) is not supported: every rank needs all rows of both heads; gather "
                "those of a divided head on each rank, and drop group="
            )
        of_teacher = {option: passed.pop(name) for name, option in OF_TEACHER.items() if name in passed}
        if of_teacher.get("temperature") is None:
            of_teacher["temperature"] = passed.get("temperature", 1.0)
        return cls(**passed, teacher=HeadArguments(**of_teacher))

    def checked(self) -> tuple[torch.dtype, torch.dtype, int]:
        """(types that the student's and the teacher's matrix products run in, entries of the vocabulary).

        Raises for everything that a caller may get wrong. Looks at shapes and types alone.
        """
        compute = checks.head(*self.tensors)
        teacher_compute = checks.head(*self.teacher.tensors, ("teacher_input", "teacher_weight", "teacher_bias"))
        self._check_teacher(accumulation_dtype(compute), accumulation_dtype(teacher_compute))
        if self.divergence not in DIVERGENCES:
            expected = ", ".join(map(repr, DIVERGENCES))
            raise ValueError(f"divergence must be one of {expected}, found {self.divergence!r}")
        if not (isinstance(self.beta, Real) and 0 < self.beta < 1):
            raise ValueError(
                f"beta must lie between 0 and 1, found {self.beta!r}: where other libraries take 0 or 1, use "
                "divergence='forward_kl' or 'reverse_kl'"
            )
        vocab = _vocabulary(self.linear_weight, self.teacher.linear_weight, self.vocab_size)
        for head, prefix in ((self, ""), (self.teacher, "teacher_")):
            head.check_numbers(prefix)
            checks.positive(f"{prefix}temperature", head.temperature)
        for name in ("mask", "token_weight"):
            checks.per_token(name, getattr(self, name), self.input)
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, True where a token takes part, found {self.mask.dtype}")
        if self.plan is not None:
            checks.instance("plan", self.plan, Plan, "see Plan.choose")
            self.plan.check(self.input, compute)
            if self.plan.passes == 2 or self.plan.filter is not None:
                raise ValueError(
                    f"{self.plan!r}, but distillation has one pass and no filter: use passes=None and filter=None"
                )
        return compute, teacher_compute, vocab

    def prepared(self) -> tuple[Tensors, Call]:
        """((x, W, b) with x flat (N, H); the call, whose objective is the Distillation)."""
        compute, teacher_compute, vocab = self.checked()
        dtype, device = accumulation_dtype(compute), self.input.device
        input, shape = self.input, self.input.shape[:-1]
        plan = self.plan
        if plan is None:
            head_gradient = self.linear_weight.requires_grad
            plan = Plan.choose(
                shape.numel(), input.shape[-1], vocab, compute, device, head_gradient=head_gradient
            )  # fmt: skip
            rows = max(1, plan.chunk_rows // 2)  # two rows of logits per token
            plan = replace(plan, chunk_rows=rows, block_rows=min(plan.block_rows, rows))
        compact = device.type == "cpu" if plan.compact is None else plan.compact
        plan = replace(plan, passes=1, compact=compact)
        mask, token_weight = (
            None if column is None else column.detach().reshape(-1).contiguous()
            for column in (self.mask, self.token_weight)
        )
        batch = select(
            Tokens(torch.zeros(shape.numel(), dtype=torch.int64, device=device)),  # there are no targets
            mask, None if token_weight is None else token_weight.to(dtype), Objective(), dtype,
            shape=shape, compact=compact, multiple=plan.chunk_rows if plan.batch_invariant else 1,
        )  # fmt: skip
        teacher = Teacher(
            self.teacher.input.detach().reshape(-1, self.teacher.input.shape[-1]),
            self.teacher.linear_weight.detach()[:vocab],
            self.teacher.head(vocab, dtype),
            teacher_compute,
        )
        distillation = Distillation(Divergence(self.divergence, float(self.beta)), teacher)
        call = Call(vocab, self.head(vocab, dtype), batch, distillation, plan, compute)
        return (input.reshape(-1, input.shape[-1]), self.linear_weight, self.linear_bias), call

    def _check_teacher(self, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
        input, teacher_input = self.input, self.teacher.input
        if teacher_input.shape[:-1] != input.shape[:-1]:
            raise ValueError(
                f"teacher_input must hold the tokens of input, {tuple(input.shape[:-1])}, "
                f"found {tuple(teacher_input.shape[:-1])}"
            )
        if teacher_input.device != input.device:
            raise ValueError(
                f"teacher_input is on {teacher_input.device} but input is on {input.device}: move it there"
            )
        if teacher_dtype != dtype:
            raise TypeError(
                f"input is {input.dtype} and teacher_input {teacher_input.dtype}: cast one, fp64 is for both"
            )


class Teacher(NamedTuple):
    """The other head: hidden states (N, H_teacher), weight (V, H_teacher), what follows its product, operands' type."""

    input: Tensor
    weight: Tensor
    head: Head
    compute: torch.dtype


class Distillation(NamedTuple):
    """What a call of distillation has in place of an objective."""

    divergence: Divergence
    teacher: Teacher


class DistillationPass(OnePass):
    """(loss, divergences (n,)) with the gradients of the loss to the student's x, W and b made on the way."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):  # (N, H), (V, H), (V,)
        loss, divergences, gradients, scale = distillation_pass((input, weight, bias), ctx.needs_input_grad, call)
        ctx.gradients = gradients.finish(rounded=scale is None)
        ctx.scale, ctx.dtypes, ctx.in_place = scale, gradients.dtypes, False
        ctx.mark_non_differentiable(divergences)
        return loss, divergences


def linear_distillation(arguments: DistillationArguments) -> DistillationOutput:
    tensors, call = arguments.prepared()
    if not torch.is_grad_enabled():
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    loss, divergences = DistillationPass.apply(*tensors, call)
    return DistillationOutput(loss, call.batch.spread(divergences))


def distillation_pass(
    tensors: Tensors, needs_grad: Sequence[bool], call: Call
) -> tuple[Tensor, Tensor, Gradients, Tensor | None]:
    """(loss, divergences (n,), gradients of the loss to x, W and b, what these are scaled by if at all)."""
    input, weight, _ = tensors
    batch, (divergence, teacher), row_ops = call.batch, call.objective, _row_ops(call.plan)
    parts = []
    with plain_matmul(input):
        products = HeadProducts(weight[: call.vocab], call.compute)
        teacher_products = HeadProducts(teacher.weight, teacher.compute)
        gradients = Gradients(tensors, needs_grad, products, call)
        teacher_buffer = call.logits_buffer(teacher_products)
        scale = fp16_scale(batch.weight) if call.compute == torch.float16 else None
        token_weight = batch.weight if scale is None else batch.weight * scale
        with_gradient = ((chunk, 0, logits, dlogits) for chunk, logits, dlogits in gradients.chunks(input))
        others = ((*piece, None) for piece in gradients.other_chunks(input))
        for chunk, known, logits, dlogits in chain(with_gradient, others):
            teacher_x = teacher_products.operand(batch.hidden(teacher.input, chunk))
            teacher_logits = teacher_products.logits(teacher_x, teacher_buffer[: len(teacher_x)])
            part = row_ops.divergence_and_gradient(
                logits, teacher_logits, dlogits, token_weight[chunk], divergence, call.head, teacher.head
            )
            parts.append(part[known:])
    divergences = torch.cat(parts) if parts else torch.empty_like(batch.weight)
    return weighted(divergences, batch.weight).sum(), divergences, gradients, scale


def _row_ops(plan: Plan) -> DivergenceRows:
    if plan.backend == "torch":
        from .torch_rows import TorchDivergenceRows

        return TorchDivergenceRows(plan.block_rows)
    _ = plan.row_ops  # for its message where Triton is missing
    from .triton_rows import TritonDivergenceRows

    return TritonDivergenceRows()


def _vocabulary(linear_weight: Tensor, teacher_weight: Tensor, vocab_size: int | None) -> int:  # (V, H), (V, H)
    students, teachers = len(linear_weight), len(teacher_weight)
    if vocab_size is None and students != teachers:
        raise ValueError(
            f"linear_weight has {students} rows and teacher_weight {teachers}: heads of one vocabulary with different "
            "padding need vocab_size=, the entries that both have"
        )
    return checks.vocabulary(linear_weight if students <= teachers else teacher_weight, vocab_size)
