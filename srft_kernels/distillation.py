"""Distillation on hidden states: the divergence between a student's head and a teacher's, without the logits of either.

Both heads' logits are made for one chunk of tokens at a time, and the gradient to the student while they are there:
2NV(3 H_student + H_teacher) flops with all gradients. The teacher is a constant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks
from .engine import Call, Gradients, OnePass, chunks_of, fp16_scale, plain_matmul, weighted_sum
from .gemm import HeadProducts, accumulation_dtype
from .head import Head
from .pack import pack
from .plan import Plan
from .prepare import Tensors
from .rows import aligned, backend
from .tokens import Tokens

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


@dataclass(frozen=True)
class DistillationOutput:
    """What `linear_distillation` returns.

    loss        scalar, Σ_t token_weight_t · divergence_t; differentiable
    divergence  of each token in nats, shaped like mask, detached; 0 where masked
    """

    loss: Tensor
    divergence: Tensor


def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    plan: Plan | None = None,
    group: None = None,
) -> DistillationOutput:
    """Σ_t token_weight_t · D(p_t, q_t) of a student p = softmax(input · linear_weightᵀ) and a teacher q, logits unmade.

    Args:
        input: the student's hidden states (..., H); fp32, bf16, fp16, or fp64 (PyTorch rows only). Never modified.
        linear_weight: its head (V, H).
        teacher_input: the teacher's hidden states (..., H_teacher) of the same tokens; any H_teacher, any type above
            (fp64 with fp64 alone). Nothing of the teacher gets a gradient.
        teacher_weight: its head (V, H_teacher).
        divergence: "forward_kl", KL(q ‖ p) = Σ_v q_v log(q_v / p_v): the student covers what the teacher does;
            "reverse_kl", KL(p ‖ q), for data the student sampled; or "jensen_shannon", the generalised one of
            arXiv 2306.13649: β KL(q ‖ m) + (1 − β) KL(p ‖ m) with m = β q + (1 − β) p.
        beta: β of "jensen_shannon", 0 < β < 1. Towards either end that divergence goes to 0, as β KL(q ‖ p) and as
            (1 − β) KL(p ‖ q): where other libraries take beta=0 or beta=1, ask for "forward_kl" or "reverse_kl".
        linear_bias, teacher_bias: (V,), or None.
        temperature: T > 0 of softmax(z / T), for both heads. The loss is not multiplied by T², as some papers do to
            keep the size of its gradient: that is a factor for `token_weight`, or for the loss.
        teacher_temperature: another one for the teacher.
        softcap, teacher_softcap: cap > 0 of cap · tanh(z / cap) in each head, before the temperature; or None.
        logit_scale, teacher_logit_scale: s > 0, times each head's logits before the cap; neither stands for the other.
        vocab_size: the vocabulary that both heads share, where one has padding rows: those past it do not exist.
        mask: (...) boolean, False where a token takes no part (target != -100, say); None: all do.
        token_weight: (...), default 1 / (number of tokens that take part). See `token_mean`, `sequence_mean`, which
            count tokens that are divided over ranks too.
        plan: how to run; default as `Plan.choose`, with chunks of half as many tokens since each has two rows.
        group: refused: a head divided over ranks, as `linear_loss` takes it, is not supported here.

    Returns:
        DistillationOutput. With no token the loss is exactly 0, and so are its gradients. Tokens' divergences come
        without a gradient, and there is no reduction="none": what each of them counts is its token_weight.

    Where p has what the reference of a KL has not (KL(q ‖ p) with p_v = 0 < q_v, KL(p ‖ q) with q_v = 0 < p_v) it is
    +∞; that of KL(q ‖ p) still has its gradient p − q, that of KL(p ‖ q) has none (NaN).

    Raises:
        ValueError, TypeError: naming the argument, what was found and what was expected, before any work.
    """
    if group is not None:
        raise ValueError(
            "linear_distillation(group=...) is not supported: every rank needs all rows of both heads; gather those of "
            "a divided head on each rank, and drop group="
        )
    arguments = DistillationArguments(
        input,
        linear_weight,
        teacher_input,
        teacher_weight,
        divergence,
        beta,
        linear_bias,
        teacher_bias,
        temperature,
        temperature if teacher_temperature is None else teacher_temperature,
        softcap,
        teacher_softcap,
        logit_scale,
        teacher_logit_scale,
        vocab_size,
        mask,
        token_weight,
        plan,
    )
    if torch.compiler.is_compiling():
        from . import compiled  # takes seconds, and nobody else needs it

        return compiled.linear_distillation(arguments)
    return distillation_of(arguments)


def distillation_of(a: DistillationArguments) -> DistillationOutput:
    tensors, call, spread = a.prepared()
    if not torch.is_grad_enabled():
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    loss, divergence = Distillation.apply(*tensors, call)
    return DistillationOutput(loss, spread(divergence))


@dataclass(frozen=True)
class DistillationArguments:
    """Those of `linear_distillation`, by their names there."""

    input: Tensor
    linear_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    divergence: str
    beta: float
    linear_bias: Tensor | None
    teacher_bias: Tensor | None
    temperature: float
    teacher_temperature: float
    softcap: float | None
    teacher_softcap: float | None
    logit_scale: float
    teacher_logit_scale: float
    vocab_size: int | None
    mask: Tensor | None
    token_weight: Tensor | None
    plan: Plan | None

    @property
    def tensors(self) -> Tensors:
        return self.input, self.linear_weight, self.linear_bias

    def checked(self) -> tuple[torch.dtype, torch.dtype, int]:
        """(types that the student's and the teacher's matrix products run in, entries of the vocabulary).

        Raises for everything that a caller may get wrong. Looks at shapes and types alone.
        """
        compute = checks.head(*self.tensors)
        of_teacher = ("teacher_input", "teacher_weight", "teacher_bias")
        teacher_compute = checks.head(self.teacher_input, self.teacher_weight, self.teacher_bias, of_teacher)
        self._check_teacher(accumulation_dtype(compute), accumulation_dtype(teacher_compute))
        if self.divergence not in DIVERGENCES:
            expected = ", ".join(map(repr, DIVERGENCES))
            raise ValueError(f"divergence must be one of {expected}, found {self.divergence!r}")
        if not (isinstance(self.beta, Real) and 0 < self.beta < 1):
            raise ValueError(
                f"beta must lie between 0 and 1, found {self.beta!r}: where other libraries take 0 or 1, use "
                "divergence='forward_kl' or 'reverse_kl'"
            )
        vocab = _vocabulary(self.linear_weight, self.teacher_weight, self.vocab_size)
        for prefix in ("", "teacher_"):
            checks.head_numbers(self, prefix)
            checks.positive(f"{prefix}temperature", getattr(self, f"{prefix}temperature"))
        for name in ("mask", "token_weight"):
            _check_per_token(name, getattr(self, name), self.input)
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, True where a token takes part, found {self.mask.dtype}")
        checks.plan(self.plan)
        if self.plan is not None:
            checks.backend(self.plan, self.input, compute)
            if self.plan.passes == 2 or self.plan.filter is not None:
                raise ValueError(
                    f"{self.plan!r}, but distillation has one pass and no filter: use passes=None and filter=None"
                )
        return compute, teacher_compute, vocab

    def prepared(self) -> tuple[Tensors, Call, Callable[[Tensor], Tensor]]:
        """((x, W, b) with x flat; the call on packed rows; what gives a packed field (n,) the shape of the tokens)."""
        compute, teacher_compute, vocab = self.checked()
        dtype = accumulation_dtype(compute)
        input, shape, device = self.input, self.input.shape[:-1], self.input.device
        # two rows of logits per token are one of twice the vocabulary
        plan = self.plan or Plan.choose(shape.numel(), input.shape[-1], 2 * vocab, compute, device)
        compact = device.type == "cpu" if plan.compact is None else plan.compact
        plan = replace(plan, passes=1, compact=compact)
        mask, token_weight = (
            None if column is None else column.detach().reshape(-1).contiguous()
            for column in (self.mask, self.token_weight)
        )
        rows, unpack = pack(
            Tokens(torch.zeros(shape.numel(), dtype=torch.int64, device=device)),  # there are no targets
            mask,
            None if token_weight is None else token_weight.to(dtype),
            None,
            dtype,
            None,
            compact,
            plan.chunk_rows if plan.batch_invariant else 1,
        )
        teacher = Teacher(
            self.teacher_input.detach().reshape(-1, self.teacher_input.shape[-1]),
            self.teacher_weight.detach()[:vocab],
            _head(
                *(self.teacher_bias, self.teacher_logit_scale, self.teacher_softcap, self.teacher_temperature),
                *(vocab, dtype),
            ),
            teacher_compute,
        )
        head = _head(self.linear_bias, self.logit_scale, self.softcap, self.temperature, vocab, dtype)
        divergence = Divergence(self.divergence, float(self.beta), teacher)
        return (
            (input.reshape(-1, input.shape[-1]), self.linear_weight, self.linear_bias),
            Call(vocab, head, rows, divergence, plan, compute),
            lambda field: unpack(field).reshape(shape),
        )

    def _check_teacher(self, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
        input, teacher_input = self.input, self.teacher_input
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


@dataclass(frozen=True)
class Teacher:
    """The other head: hidden states (N, H_teacher), weight (V, H_teacher), what follows its product, operands' type."""

    input: Tensor
    weight: Tensor
    head: Head
    compute: torch.dtype


@dataclass(frozen=True)
class Divergence:
    """What is made of a student's row: the call's objective."""

    kind: str
    beta: float
    teacher: Teacher


class Distillation(OnePass):
    """(loss, divergence (n,)) with the gradients of the loss to the student's x, W and b made on the way."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        loss, divergence, gradients, scale = distil((input, weight, bias), ctx.needs_input_grad, call)
        ctx.gradients = gradients.finish(rounded=scale is None)
        ctx.scale, ctx.dtypes, ctx.given = scale, gradients.dtypes, False
        ctx.mark_non_differentiable(divergence)
        return loss, divergence


def distil(tensors: Tensors, wanted: Sequence[bool], call: Call) -> tuple[Tensor, Tensor, Gradients, Tensor | None]:
    """(loss, divergence (n,), gradients of the loss to x, W and b, what these are scaled by if at all)."""
    input, weight, _ = tensors
    rows, objective, row_ops = call.rows, call.objective, _rows(call.plan.backend)
    teacher, found = objective.teacher, []
    with plain_matmul(input):
        products = HeadProducts(weight[: call.vocab], call.compute)
        teacher_products = HeadProducts(teacher.weight, teacher.compute)
        gradients = Gradients(tensors, wanted, products, rows, call)
        buffer, teacher_buffer = call.logits_buffer(products), call.logits_buffer(teacher_products)
        scale = fp16_scale(rows.weight) if call.compute == torch.float16 else None
        token_weight = rows.weight if scale is None else rows.weight * scale
        for chunk in chunks_of(call):
            x = products.operand(rows.hidden(input, chunk))
            teacher_x = teacher_products.operand(rows.hidden(teacher.input, chunk))
            active = any(wanted) and chunk.start < rows.active
            divergence, dlogits = row_ops.divergence(
                products.logits(x, buffer[: len(x)]),
                teacher_products.logits(teacher_x, teacher_buffer[: len(x)]),
                token_weight[chunk],
                objective.kind,
                objective.beta,
                call.head,
                teacher.head,
                call.plan.block_rows,
                products.compute if active else None,
            )
            if active:
                gradients.add(dlogits, x, chunk)
            found.append(divergence)
    found = torch.cat(found) if found else torch.empty_like(rows.weight)
    return weighted_sum(found, rows.weight), found, gradients, scale


def _rows(name: str) -> ModuleType:
    backend(name)  # for its message where Triton is missing
    return importlib.import_module(f".rows.{name}_distillation", __package__)


def _head(
    bias: Tensor | None, scale: float, softcap: float | None, temperature: float, vocab: int, dtype: torch.dtype
) -> Head:
    bias = None if bias is None else aligned(bias.detach()[:vocab], dtype)
    return Head(bias, float(scale), None if softcap is None else float(softcap), float(temperature))


def _vocabulary(linear_weight: Tensor, teacher_weight: Tensor, vocab_size: int | None) -> int:
    students, teachers = len(linear_weight), len(teacher_weight)
    if vocab_size is None and students != teachers:
        raise ValueError(
            f"linear_weight has {students} rows and teacher_weight {teachers}: heads of one vocabulary with different "
            "padding need vocab_size=, the entries that both have"
        )
    return checks.vocabulary(linear_weight if students <= teachers else teacher_weight, vocab_size)


def _check_per_token(name: str, value: Any, input: Tensor) -> None:
    if value is None:
        return
    checks.tensor(name, value)
    if value.shape != input.shape[:-1]:
        raise ValueError(
            f"{name} must be shaped like input without its last dimension, {tuple(input.shape[:-1])}, "
            f"found {tuple(value.shape)}"
        )
    if value.device != input.device:
        raise ValueError(f"{name} is on {value.device} but input is on {input.device}: move it there")
