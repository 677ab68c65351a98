"""The chunk loop, as two autograd functions.

    OnePass     statistics, loss and all gradients of a chunk of tokens while its logits are alive: 6NHV flops.
                Backward only scales what the forward made, and hands it over.
    Statistics  (ℓ, H, lse) of every token, differentiable any way the caller likes: 2NHV flops forward; backward
                recomputes the logits and multiplies once more for each gradient wanted: 6NHV.

Both walk over Rows (pack.py): the tokens that take part, those that cannot have a gradient last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .derivatives import once_differentiable
from .extras import Taken
from .filter import Filtered
from .gemm import HeadProducts, accumulation_dtype
from .head import Head
from .pack import Rows
from .plan import Plan
from .rows import Normalizer, aligned_size, backend, in_three_steps, runs_triton
from .tokens import TokenStats, crosses, per_token_loss
from .vocab_parallel import Shard, ShardedRows


@dataclass(frozen=True)
class Call:
    """A checked call of the loss head: everything but x (N, H), W (V or more rows, H) and b, which autograd passes."""

    vocab: int  # V, or the entries on this rank
    head: Head
    rows: Rows
    objective: Any
    plan: Plan
    compute: torch.dtype
    weight_grad: Tensor | None = None  # (V, H) that ∂loss/∂W is added to instead of returned
    filtered: Tensor | None = None  # (4,) the sum of Filtered.squares so far, with a plan that filters
    shard: Shard | None = None  # which part of the vocabulary W is, where ranks share it
    chunks: tuple[slice, ...] | None = None  # of whole sequences, where a token's loss depends on its own
    taken: Taken | None = None  # to be filled by the row operations, where extras are asked for

    @property
    def row_ops(self) -> ModuleType | ShardedRows:
        ops = backend(self.plan.backend)
        return ops if self.shard is None else ShardedRows(ops, self.shard)

    def asked(self, chunk: slice) -> dict[str, Taken]:
        """What row operations are to take of these rows, besides."""
        return {} if self.taken is None else {"taken": self.taken.rows(chunk)}

    def logits_buffer(self, products: HeadProducts) -> Tensor:
        """Room for one chunk's logits (chunk_rows, V), its rows at aligned addresses."""
        rows = min(self.plan.chunk_rows, max(len(self.rows), 1))
        return products.weight.new_empty(rows, aligned_size(self.vocab), dtype=products.dtype)[:, : self.vocab]


class OnePass(torch.autograd.Function):
    """(loss, ℓ (n,), H (n,), lse (n,)) with the gradients of the loss to x, W and b made on the way."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        loss, stats, gradients, scale = one_pass((input, weight, bias), ctx.needs_input_grad, call)
        ctx.gradients = gradients.finish(rounded=scale is None)  # scaled sums over tokens may not fit into fp16
        ctx.scale, ctx.dtypes, ctx.given = scale, gradients.dtypes, gradients.given
        outputs = stats.fields()[:3]
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)  # zeros for these, made at every backward
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_):
        if grad_loss is None:
            return (None,) * 4
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran a second time through this loss, whose gradients the first one handed over: "
                "give the first one retain_graph=True"
            )
        if ctx.given:
            _assert_one(grad_loss)
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():  # backward(retain_graph=True)
            gradients = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
        else:
            ctx.gradients = None  # so that autograd can take them over without a copy
        factor = grad_loss if ctx.scale is None else grad_loss / ctx.scale
        made = zip(gradients, ctx.dtypes)
        return *(None if gradient is None else _scaled_(gradient, factor).to(dtype) for gradient, dtype in made), None


class Statistics(torch.autograd.Function):
    """ℓ, H, lse (and the smoothing statistic where the head has class weights) of the packed rows, each (n,)."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):
        stats, normalizer = first_pass((input, weight, bias), call)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, *normalizer)
        return stats.fields()

    @staticmethod
    @once_differentiable
    def backward(ctx, *coefs: Tensor | None):
        if all(coef is None for coef in coefs):
            return (None,) * 4
        *tensors, shift, log_total, mean = ctx.saved_tensors
        normalizer = Normalizer(shift, log_total, mean)
        return *second_pass(tensors, ctx.needs_input_grad, ctx.call, normalizer, coefs).finish(), None


def one_pass(
    tensors: Sequence[Tensor | None], wanted: Sequence[bool], call: Call
) -> tuple[Tensor, TokenStats, Gradients, Tensor | None]:
    """(loss, statistics, gradients of the loss to x, W and b, what these are scaled by if at all)."""
    input, weight, _ = tensors
    rows, row_ops = call.rows, call.row_ops
    row_pass = row_ops.loss_and_gradient
    if call.chunks is not None:  # the objective wants to see whole sequences, row operations may show it less
        row_pass = partial(in_three_steps, row_ops.statistics, row_ops.gradient)
    parts, losses = [], []
    with plain_matmul(input):
        products = HeadProducts(weight[: call.vocab], call.compute)
        gradients = Gradients(tensors, wanted, products, rows, call)
        buffer = call.logits_buffer(products)
        token_weight = rows.weight
        # fp16 gradients of a mean over many tokens would underflow: carry them scaled by a power of two
        scale = fp16_scale(token_weight) if call.compute == torch.float16 else None
        if scale is not None:
            token_weight = token_weight * scale
        for chunk in chunks_of(call):
            x = products.operand(rows.hidden(input, chunk))
            logits = products.logits(x, buffer[: len(x)])
            tokens, head = rows.tokens.rows(chunk), rows.head(call.head, chunk)
            if chunk.start < rows.active:
                stats, loss, dlogits = row_pass(
                    logits,
                    tokens,
                    token_weight[chunk],
                    call.objective,
                    head,
                    call.plan.block_rows,
                    products.compute,
                    **call.asked(chunk),
                )
                gradients.add(dlogits, x, chunk)
            else:
                stats, _ = row_ops.statistics(logits, tokens.target, head, call.plan.block_rows, **call.asked(chunk))
                loss = per_token_loss(call.objective, stats, tokens)
            parts.append(stats)
            losses.append(loss)
    loss = weighted_sum(torch.cat(losses) if losses else rows.weight, rows.weight)
    return loss, _joined(parts, rows.weight), gradients, scale


def first_pass(tensors: Sequence[Tensor | None], call: Call) -> tuple[TokenStats, Normalizer]:
    """Statistics of the packed rows, and what the second pass needs of them."""
    input, weight, _ = tensors
    rows, row_ops = call.rows, call.row_ops
    parts, normalizers = [], []
    with plain_matmul(input):
        products = HeadProducts(weight[: call.vocab], call.compute)
        buffer = call.logits_buffer(products)
        for chunk in call.plan.chunks(len(rows)):
            x = products.operand(rows.hidden(input, chunk))
            logits = products.logits(x, buffer[: len(x)])
            head = rows.head(call.head, chunk)
            stats, normalizer = row_ops.statistics(
                logits, rows.tokens.target[chunk], head, call.plan.block_rows, **call.asked(chunk)
            )
            parts.append(stats)
            normalizers.append(normalizer)
    if not parts:
        return _joined(parts, rows.weight, call.head.smooth is not None), Normalizer(*[rows.weight] * 3)
    return _joined(parts, rows.weight), Normalizer(*(torch.cat(fields) for fields in zip(*normalizers)))


def second_pass(
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    call: Call,
    normalizer: Normalizer,
    coefs: tuple[Tensor | None, ...],
) -> Gradients:
    """Gradients to x, W and b, from those to the rows' statistics (n,): the logits are made again."""
    input, weight, _ = tensors
    row_ops = call.row_ops
    coefs, rows, normalizer = _rows_with_gradient(coefs, call, normalizer)
    with plain_matmul(input):
        products = HeadProducts(weight[: call.vocab], call.compute)
        gradients = Gradients(tensors, wanted, products, rows, call)
        buffer = call.logits_buffer(products)
        for chunk in call.plan.chunks(len(rows)):
            x = products.operand(rows.hidden(input, chunk))
            logits = products.logits(x, buffer[: len(x)])
            dlogits = row_ops.gradient(
                logits,
                rows.tokens.target[chunk],
                Normalizer(*(field[chunk] for field in normalizer)),
                tuple(None if coef is None else coef[chunk] for coef in coefs),
                rows.head(call.head, chunk),
                call.plan.block_rows,
                products.compute,
            )
            gradients.add(dlogits, x, chunk)
    return gradients


class Gradients:
    """The gradients to x, W and b as chunks of rows add to them; those that nobody wants cost nothing.

    The first `active` of the rows will be added: the other rows of dx are 0.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        products: HeadProducts,
        rows: Rows,
        call: Call,
    ):
        input, weight, bias = tensors
        self.filter, self.filtered = call.plan.filter, call.filtered
        self.shard, self.summing = call.shard, None
        self.given = call.weight_grad is not None
        self.products, self.index = products, rows.index
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        self.empty = rows.active == 0
        new = torch.empty_like if rows.index is None and not self.empty else torch.zeros_like
        # one pass carries fp16 gradients scaled up, which only fp32 has room for
        self.scaled = call.compute == torch.float16
        dtype = products.dtype if self.scaled else input.dtype
        self.input = new(input, dtype=dtype, memory_format=torch.contiguous_format) if wanted[0] else None
        self.bias = bias.new_zeros(bias.shape, dtype=products.dtype) if wanted[2] else None
        self.weight, self.first = call.weight_grad, not self.given
        if wanted[1] and not self.given:
            new = weight.new_empty if self.filter is None else weight.new_zeros
            single = products.mixed and rows.active <= call.plan.chunk_rows and self.filter is None
            narrow = single and not self.scaled
            self.weight = new(weight.shape, dtype=products.compute if narrow else products.dtype)
            written = 0 if self.empty else len(products.weight)
            if written < len(weight):  # rows that no chunk writes: the vocabulary's padding, or all of them
                self.weight[written:].zero_()

    def add(self, dlogits: Tensor, x: Tensor, chunk: slice) -> None:
        """Add a chunk's ∂L/∂a (n, V) with its hidden states (n, H)."""
        vocab = dlogits.shape[1]
        if self.bias is not None:
            self.bias[:vocab] += dlogits.sum(0, dtype=self.products.dtype)
        products = self.products
        if self.filter is not None:
            products = Filtered(products, dlogits, self.filter)
        if self.input is not None and self.shard is None:
            self._put(chunk, products.input_gradient(dlogits, rounded=not self.scaled))
        elif self.input is not None:  # summed while the products that follow run
            made = products.input_gradient(dlogits, rounded=False)
            self._put_sum()
            self.summing = chunk, made, self.shard.add_(made)
        if self.weight is not None:
            products.add_weight_gradient(self.weight[:vocab], dlogits, x, self.first)
        if self.filter is not None:
            self.filtered += products.squares
        self.first = False

    def finish(self, rounded: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dW, db), if `rounded` in the types of the inputs."""
        self._put_sum()
        made = (self.input, None if self.given else self.weight, self.bias)
        if not rounded:
            return made
        return tuple(None if g is None else g.to(dtype) for g, dtype in zip(made, self.dtypes))

    def _put(self, chunk: slice, made: Tensor) -> None:
        """A chunk's rows of dx (n, H) to their places."""
        made = made.to(self.input.dtype)
        if self.index is None:
            places = self.input[chunk]
            places.copy_(made[: len(places)])  # not the padding's
        else:
            places = self.index[chunk]
            self.input[places] = made[: len(places)]

    def _put_sum(self) -> None:
        if self.summing is not None:
            chunk, made, work = self.summing
            work.wait()
            self._put(chunk, made)
            self.summing = None


def weighted_sum(loss: Tensor, weight: Tensor) -> Tensor:
    """Σ weight · loss, where a weight of 0 silences even an infinite loss."""
    return torch.where(weight == 0, 0, loss * weight).sum()


def weighted_loss(objective: Any, stats: TokenStats, rows: Rows) -> Tensor:
    """Σ weight · loss of the rows. A weight of 0 silences the gradient too, which may be 0 · NaN."""
    if not crosses(objective, rows.tokens):
        silent = rows.weight == 0
        stats = stats.map(lambda field: torch.where(silent, field.detach(), field))
    return weighted_sum(per_token_loss(objective, stats, rows.tokens), rows.weight)


def chunks_of(call: Call):
    """Chunks of the rows with gradient, then of the rest."""
    if call.chunks is not None:
        yield from call.chunks
        return
    yield from call.plan.chunks(call.rows.active)
    for chunk in call.plan.chunks(len(call.rows) - call.rows.active):
        yield slice(chunk.start + call.rows.active, chunk.stop + call.rows.active)


def _joined(parts: list[TokenStats], like: Tensor, smooth: bool = False) -> TokenStats:
    if not parts:
        return TokenStats(*(torch.empty_like(like) for _ in range(4 if smooth else 3)))
    return TokenStats(*(torch.cat(fields) for fields in zip(*(part.fields() for part in parts))))


def _rows_with_gradient(coefs: tuple[Tensor | None, ...], call: Call, normalizer: Normalizer):
    """All three, of the rows where any coefficient is not zero; of all rows where counting would stall."""
    if (live := call.rows.live) is not None:  # what a dead row's annotations hold may have made 0 · ∞
        coefs = tuple(None if coef is None else torch.where(live, coef, 0) for coef in coefs)
    if not call.plan.compact or call.plan.batch_invariant:
        return coefs, call.rows, normalizer
    # past the active rows a coefficient may still be 0 · ∞
    keep = torch.stack([coef != 0 for coef in coefs if coef is not None]).any(0)[: call.rows.active].nonzero()[:, 0]
    if len(keep) == len(call.rows):
        return coefs, call.rows, normalizer
    coefs = tuple(None if coef is None else coef[keep] for coef in coefs)
    return coefs, call.rows.only(keep), Normalizer(*(field[keep] for field in normalizer))


def plain_matmul(input: Tensor):
    """Autocast off: operands already have the type they should be multiplied in."""
    try:
        return torch.autocast(input.device.type, enabled=False)
    except RuntimeError:  # a device without autocast
        return contextlib.nullcontext()


def fp16_scale(token_weight: Tensor) -> Tensor:
    """A power of two near 1 / (largest token weight)."""
    if len(token_weight) == 0:
        return token_weight.new_ones(())
    return torch.exp2(-token_weight.abs().amax().clamp(min=2.0**-60, max=2.0**60).log2().floor())


def _assert_one(factor: Tensor) -> None:
    """What was added to `weight_grad` in the forward cannot be scaled any more. On an accelerator nothing waits."""
    message = "linear_loss(weight_grad=...) was scaled after the call: put every factor of the loss into token_weight"
    if factor.device.type != "cpu":
        torch._assert_async(factor == 1, message)
    elif factor != 1:
        raise RuntimeError(f"{message} (found a factor of {factor.item():g})")


def _scaled_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor, in place; in most training factor is exactly 1 and nothing is read or written."""
    if gradient.device.type == "cpu":
        return gradient if factor.item() == 1 else gradient.mul_(factor.item())
    if runs_triton(gradient.device, gradient.dtype):
        return backend("triton").scale_(gradient, factor)
    # not mul_(factor), which would first round the factor to a 16-bit gradient's type
    return gradient.copy_(gradient.to(accumulation_dtype(gradient.dtype)) * factor)
