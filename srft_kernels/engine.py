"""The chunk loop, as two autograd functions, and what the public functions make of them.

    OnePass     statistics, loss and all gradients of a chunk of tokens while its logits are alive: 6NHV flops.
                Backward only scales what the forward made, and hands it over.
    Statistics  (ℓ, H, lse) of every token, differentiable any way the caller likes: 2NHV flops forward; backward
                recomputes the logits and multiplies once more for each gradient needed: 6NHV.

Both walk over a Batch (batch.py): the tokens that take part, those that cannot have a gradient last.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks
from .batch import Batch
from .call import Arguments, Call, Tensors
from .filter import Filtered
from .head import HeadProducts, accumulation_dtype, aligned_size, rows_of
from .objectives.objective import Objective, TokenStats, cat, couples, token_losses, weighted
from .output import LossOutput, Metrics
from .plan import runs_triton
from .rows import Coefs, Normalizer, in_three_steps

DIFFERENTIABLE_ONCE = (
    b"srft_kernels is differentiable once: its gradients are constants to autograd, and a second derivative of the "
    b"loss head (create_graph=True) is not supported; srft_kernels.reference, on full logits, has one"
)


def linear_loss(arguments: Arguments) -> LossOutput:
    tensors, call = arguments.prepared()
    loss, stats = _loss_and_statistics(tensors, call)
    batch, extras, argmax = call.batch, call.token_extras(stats), None
    if extras is not None:
        argmax, extras = extras.argmax, extras.map(batch.spread)
    stats = stats.map(lambda field: field.detach() if field.requires_grad else field)
    told = Metrics(call.objective, stats, batch.tokens, argmax, call.filtered, batch.weight)
    return LossOutput(loss, *map(batch.placed, stats.fields()[:3]), extras, told)


def linear_logprobs(arguments: Arguments) -> TokenStats:
    tensors, call = arguments.prepared()
    stats, spread = _statistics(tensors, call), call.batch.spread
    extras = call.token_extras(stats)
    return replace(stats.map(spread), extras=extras and extras.map(spread))


def linear_cross_entropy(arguments: Arguments) -> Tensor:
    tensors, call = arguments.prepared()
    if arguments.reduction == "none":  # each token's upstream gradient is known only in the backward
        stats = _statistics(tensors, call)
        return call.batch.spread(token_losses(call.objective, stats, call.batch.tokens))
    return _loss_and_statistics(tensors, call)[0]


def _loss_and_statistics(tensors: Tensors, call: Call) -> tuple[Tensor, TokenStats]:
    """(Σ weight · loss, statistics) in one pass where a gradient is needed and the plan says so, else in two.

    Statistics of dead rows are 0.
    """
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    # a checkpoint runs the forward again, where one pass would add to weight_grad a second time; two do in the backward
    again = call.weight_grad is not None and checks.runs_again()
    if call.plan.passes == 1 and torch.is_grad_enabled() and differentiable and not again:
        loss, *fields = OnePass.apply(*tensors, call)
        return loss, TokenStats(*fields)
    stats = _statistics(tensors, call)
    return weighted_loss(call.objective, stats, call.batch), stats.map(Tensor.detach).where(call.batch.live)


def _statistics(tensors: Tensors, call: Call) -> TokenStats:
    return TokenStats(*Statistics.apply(*tensors, call))


# ---- autograd


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose gradients raise when they are differentiated themselves.

    torch's decorator of this name leaves them without a graph where the upstream gradient has none, as that of a loss:
    a penalty on gradients would then do nothing, without a word.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph=True
            return gradients
        return tuple(_raising(value) if isinstance(value, Tensor) else value for value in gradients)

    return wrapped


def _raising(gradient: Tensor) -> Tensor:  # any shape
    return torch._C._functions.DelayedError(DIFFERENTIABLE_ONCE, 1)(gradient.detach().requires_grad_())


class OnePass(torch.autograd.Function):
    """(loss, ℓ (n,), H (n,), lse (n,)) with the gradients of the loss to x, W and b made on the way."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):  # (N, H), (V, H), (V,)
        loss, stats, gradients, scale = one_pass((input, weight, bias), ctx.needs_input_grad, call)
        ctx.gradients = gradients.finish(rounded=scale is None)  # scaled sums over tokens may not fit into fp16
        ctx.scale, ctx.dtypes, ctx.in_place = scale, gradients.dtypes, gradients.in_place
        outputs = stats.fields()[:3]
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)  # zeros for these, made at every backward
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_):  # ()
        if grad_loss is None:
            return (None,) * 4
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran a second time through this loss, whose gradients the first one handed over: "
                "give the first one retain_graph=True"
            )
        if ctx.in_place:
            _assert_one(grad_loss)
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():  # backward(retain_graph=True)
            gradients = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
        else:
            ctx.gradients = None  # so that autograd can take them over without a copy
        factor = grad_loss if ctx.scale is None else grad_loss / ctx.scale
        pairs = zip(gradients, ctx.dtypes)
        return *(None if gradient is None else _scaled_(gradient, factor).to(dtype) for gradient, dtype in pairs), None


class Statistics(torch.autograd.Function):
    """ℓ, H, lse (and the smoothing statistic where the head has class weights) of the packed rows, each (n,)."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call):  # (N, H), (V, H), (V,)
        stats, normalizer = first_pass((input, weight, bias), call)
        if any(ctx.needs_input_grad):  # in a call the targets may be the caller's memory, which may be filled anew
            tokens = call.batch.tokens
            own = replace(call.batch, tokens=tokens.replace(target=tokens.target.clone()))
            ctx.call = replace(call, batch=own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, *normalizer)
        return stats.fields()

    @staticmethod
    @once_differentiable
    def backward(ctx, *coefs: Tensor | None):  # (n,) each
        if all(coef is None for coef in coefs):
            return (None,) * 4
        *tensors, shift, log_total, mean = ctx.saved_tensors
        normalizer = Normalizer(shift, log_total, mean)
        return *second_pass(tensors, ctx.needs_input_grad, ctx.call, normalizer, coefs).finish(), None


# ---- the chunk loop


def one_pass(
    tensors: Tensors, needs_grad: Sequence[bool], call: Call
) -> tuple[Tensor, TokenStats, Gradients, Tensor | None]:
    """(loss, statistics, gradients of the loss to x, W and b, what these are scaled by if at all)."""
    input, weight, _ = tensors
    batch, row_ops = call.batch, call.row_ops
    row_pass = row_ops.loss_and_gradient
    if call.chunks is not None:  # the objective wants to see whole sequences, row operations may show it less
        row_pass = partial(in_three_steps, row_ops)
    parts, losses = [], []
    with plain_matmul(input):
        products = HeadProducts(rows_of(weight, slice(0, call.vocab)), call.compute)
        gradients = Gradients(tensors, needs_grad, products, call)
        # fp16 gradients of a mean over many tokens would underflow: carry them scaled by a power of two
        scale = fp16_scale(batch.weight, call.objective.steep) if call.compute == torch.float16 else None
        token_weight = batch.weight if scale is None else batch.weight * scale
        for chunk, logits, dlogits in gradients.chunks(input):
            tokens, head, extras = batch.tokens[chunk], call.head_of(chunk), call.extras and call.extras[chunk]
            weights = rows_of(token_weight, chunk)
            stats, loss = row_pass(logits, dlogits, tokens, weights, call.objective, head, extras)
            parts.append(stats)
            losses.append(loss)
        for chunk, known, logits in gradients.other_chunks(input):
            tokens, extras = batch.tokens[chunk], call.extras and call.extras[chunk]
            stats, _ = row_ops.statistics(logits, tokens.target, call.head_of(chunk), extras)
            loss = weighted(token_losses(call.objective, stats, tokens), token_weight[chunk])
            parts.append(stats.map(lambda field, known=known: field[known:]))
            losses.append(loss[known:])
    loss = cat(losses).sum() if losses else batch.weight.sum()
    return loss if scale is None else loss / scale, _joined(parts, batch.weight), gradients, scale


def first_pass(tensors: Tensors, call: Call) -> tuple[TokenStats, Normalizer]:
    """Statistics of the batch's rows, and what the second pass needs of them."""
    input, weight, _ = tensors
    batch, row_ops = call.batch, call.row_ops
    parts, normalizers = [], []
    with plain_matmul(input):
        products = HeadProducts(rows_of(weight, slice(0, call.vocab)), call.compute)
        buffer = call.logits_buffer(products)
        for chunk in call.plan.chunks(len(batch)):
            x = products.operand(batch.hidden(input, chunk))
            logits = products.logits(x, buffer[: len(x)])
            extras = call.extras and call.extras[chunk]
            stats, normalizer = row_ops.statistics(logits, batch.tokens.target[chunk], call.head_of(chunk), extras)
            parts.append(stats)
            normalizers.append(normalizer)
    if not parts:
        return _joined(parts, batch.weight, call.head.smooth is not None), Normalizer(*[batch.weight] * 3)
    return _joined(parts, batch.weight), Normalizer(*map(cat, zip(*normalizers)))


def second_pass(
    tensors: Tensors, needs_grad: Sequence[bool], call: Call, normalizer: Normalizer, coefs: Coefs
) -> Gradients:
    """Gradients to x, W and b, from those to the rows' statistics: the logits are made again."""
    input, weight, _ = tensors
    row_ops = call.row_ops
    coefs, batch, normalizer = _rows_with_gradient(coefs, call, normalizer)
    call = replace(call, batch=batch, chunks=None)
    with plain_matmul(input):
        products = HeadProducts(rows_of(weight, slice(0, call.vocab)), call.compute)
        gradients = Gradients(tensors, needs_grad, products, call)
        for chunk, logits, dlogits in gradients.chunks(input):
            row_ops.gradient(
                logits, dlogits, batch.tokens.target[chunk], Normalizer(*(field[chunk] for field in normalizer)),
                tuple(None if coef is None else coef[chunk] for coef in coefs), call.head_of(chunk),
            )  # fmt: skip
    return gradients


class Gradients:
    """The gradients to x, W and b: filled chunk by chunk, multiplied group by group; those nobody needs cost nothing.

    A chunk is as many tokens as have logits at one time, a group as many as have ∂L/∂a at one time (plan.py). Where one
    group holds all tokens, dW needs no sum in fp32 and no rounding afterwards. Rows of no group have a dx of 0.
    """

    def __init__(self, tensors: Tensors, needs_grad: Sequence[bool], products: HeadProducts, call: Call):
        input, weight, bias = tensors
        batch = call.batch
        self.call, self.products, self.index = call, products, batch.index
        self.filter, self.shard, self.summing = call.plan.filter, call.shard, None
        self.groups = list(call.groups()) if any(needs_grad) else []
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        # one pass carries fp16 gradients scaled up, which only fp32 has room for
        scaled = call.compute == torch.float16
        new = torch.empty_like if batch.index is None and self.groups else torch.zeros_like
        dtype = products.dtype if scaled else input.dtype
        self.input = new(input, dtype=dtype, memory_format=torch.contiguous_format) if needs_grad[0] else None
        self.bias = bias.new_zeros(bias.shape, dtype=products.dtype) if needs_grad[2] else None
        self.in_place = call.weight_grad is not None
        self.weight, self.first, self.rounded = call.weight_grad, not self.in_place, None
        if needs_grad[1] and not self.in_place:
            new = weight.new_empty if self.filter is None else weight.new_zeros
            narrow = products.mixed and weight.dtype == products.compute and self.filter is None and not scaled
            if narrow and len(self.groups) > 1:  # its memory is free until the sum is complete
                self.rounded = new(weight.shape)
            single = narrow and self.rounded is None
            self.weight = new(weight.shape, dtype=products.compute if single else products.dtype)
            written = len(products.weight) if self.groups else 0
            if written < len(weight):  # rows that no group writes: the vocabulary's padding, or all of them
                self.weight[written:].zero_()
        self._make_room()

    def _make_room(self) -> None:
        """Buffers for a chunk's logits and a group's ∂L/∂a, their rows at aligned addresses; one where types agree."""
        products, plan, vocab = self.products, self.call.plan, self.call.vocab
        stride = aligned_size(vocab)
        rows = max((rows.stop - rows.start for rows, _ in self.groups), default=0)
        self.one = products.compute == products.dtype
        if self.one:
            rows = max(rows, min(plan.chunk_rows, len(self.call.batch)))
        if self.rounded is not None and rows * stride <= self.rounded.numel():
            room = self.rounded.view(-1)[: rows * stride].view(rows, stride)
        else:
            room = products.weight.new_empty(rows, stride)
        self.dlogits = room if stride == vocab else room[:, :vocab]
        self.logits = self.dlogits if self.one else self.call.logits_buffer(products)

    def chunks(self, input: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:  # (N, H)
        """Each chunk of the rows that may have a gradient: (its rows, logits (n, V), dlogits (n, V)).

        ∂L/∂a is to be put into dlogits, which may be the logits, before the next chunk is asked for.
        """
        for group, chunks in self.groups:
            x = self.products.operand(self.call.batch.hidden(input, group))
            for chunk in chunks:
                rows = slice(chunk.start - group.start, chunk.stop - group.start)
                dlogits = rows_of(self.dlogits, rows)
                room = dlogits if self.one else rows_of(self.logits, slice(0, dlogits.shape[0]))
                logits = self.products.logits(rows_of(x, rows), room)
                yield chunk, dlogits if self.one else logits, dlogits
            self._add(rows_of(self.dlogits, slice(0, x.shape[0])), x, group)

    def other_chunks(self, input: Tensor) -> Iterator[tuple[slice, int, Tensor]]:  # (N, H)
        """Each chunk of the rest: (its rows, how many of them were in a chunk already, logits (n, V))."""
        start = self.groups[-1][0].stop if self.groups else 0
        for chunk, known in self.call.other_chunks(start):
            x = self.products.operand(self.call.batch.hidden(input, chunk))
            yield chunk, known, self.products.logits(x, self.logits[: len(x)])

    def _add(self, dlogits: Tensor, x: Tensor, rows: slice) -> None:  # (n, V), (n, H)
        """Add what a group's ∂L/∂a and its hidden states make."""
        vocab = dlogits.shape[1]
        if self.bias is not None:
            self.bias[:vocab] += dlogits.sum(0, dtype=self.products.dtype)
        products = self.products
        if self.filter is not None:
            products = Filtered(products, dlogits, self.filter)
        if self.input is not None:
            dx = products.input_gradient(dlogits)
            if self.shard is None or self.shard.partial:
                self._put(rows, dx)
            else:  # summed while the products that follow run
                self._put_sum()
                self.summing = rows, dx, self.shard.add_(dx)
        if self.weight is not None:
            products.add_weight_gradient(rows_of(self.weight, slice(0, vocab)), dlogits, x, self.first)
        if self.filter is not None:
            self.call.filtered.add_(products.squares)
        self.first = False

    def finish(self, rounded: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dW, db), if `rounded` in the types of the inputs."""
        self._put_sum()
        self.dlogits = self.logits = None
        weight = None if self.in_place else self.weight
        if self.rounded is not None:
            weight = self.rounded.copy_(weight)
        gradients = self.input, weight, self.bias
        if not rounded:
            return gradients
        return tuple(None if g is None else g.to(dtype) for g, dtype in zip(gradients, self.dtypes))

    def _put(self, rows: slice, dx: Tensor) -> None:  # (n, H)
        """A group's rows of dx to their places."""
        if self.index is None:
            places = rows_of(self.input, rows)
            places.copy_(rows_of(dx, slice(0, places.shape[0])))  # not the padding's
        else:
            places = self.index[rows]
            self.input[places] = dx[: len(places)].to(self.input.dtype)

    def _put_sum(self) -> None:
        if self.summing is not None:
            rows, dx, work = self.summing
            work.wait()
            self._put(rows, dx)
            self.summing = None


# ---- small parts


def weighted_loss(objective: Objective, stats: TokenStats, batch: Batch) -> Tensor:
    """Σ weight · loss of the rows. A weight of 0 silences the gradient too, which may be 0 · NaN."""
    if not couples(objective, batch.tokens):
        silent = batch.weight == 0
        stats = stats.map(lambda field: torch.where(silent, field.detach(), field))
    return weighted(token_losses(objective, stats, batch.tokens), batch.weight).sum()


def _joined(parts: list[TokenStats], like: Tensor, smooth: bool = False) -> TokenStats:  # (n,)
    if not parts:
        return TokenStats(*(torch.empty_like(like) for _ in range(4 if smooth else 3)))
    return TokenStats.cat(parts)


def _rows_with_gradient(coefs: Coefs, call: Call, normalizer: Normalizer) -> tuple[Coefs, Batch, Normalizer]:
    """(coefs, batch, normalizer) of the rows where any coefficient is not zero; of all where counting would stall."""
    batch = call.batch
    if (live := batch.live) is not None:  # what a dead row's annotations hold may have made 0 · ∞
        coefs = tuple(None if coef is None else torch.where(live, coef, 0) for coef in coefs)
    if not call.plan.compact or call.plan.batch_invariant:
        return coefs, batch, normalizer
    # past the active rows a coefficient may still be 0 · ∞
    keep = torch.stack([coef != 0 for coef in coefs if coef is not None]).any(0)[: batch.active].nonzero()[:, 0]
    if len(keep) == len(batch):
        return coefs, batch, normalizer
    coefs = tuple(None if coef is None else coef[keep] for coef in coefs)
    return coefs, batch[keep], Normalizer(*(field[keep] for field in normalizer))


def plain_matmul(input: Tensor):  # (..., H)
    """Autocast off: operands already have the type they should be multiplied in."""
    try:
        return torch.autocast(input.device.type, enabled=False)
    except RuntimeError:  # a device without autocast
        return contextlib.nullcontext()


def fp16_scale(token_weight: Tensor, steep: bool = False) -> Tensor:  # (n,)
    """A power of two that takes the largest token weight to about 1. Where a token's slope may be large (`steep`), as a
    KL estimate's e^{13}, a smaller weight to 2⁻⁵ alone, and one in between stays, and overflows as eager's does."""
    if len(token_weight) == 0:
        return token_weight.new_ones(())
    exponent = token_weight.abs().amax().clamp(min=2.0**-60, max=2.0**60).log2().floor()
    return torch.exp2(-exponent.clamp(min=0) - (exponent + 5).clamp(max=0) if steep else -exponent)


def _assert_one(factor: Tensor) -> None:  # ()
    """What was added to `weight_grad` in the forward cannot be scaled any more. On an accelerator nothing waits."""
    message = "linear_loss(weight_grad=...) was scaled after the call: put every factor of the loss into token_weight"
    if factor.device.type != "cpu":
        torch._assert_async(factor == 1, message)
    elif factor != 1:
        raise RuntimeError(f"{message} (found a factor of {factor.item():g})")


def _scaled_(gradient: Tensor, factor: Tensor) -> Tensor:  # any shape, ()
    """gradient · factor, in place; in most training factor is exactly 1 and nothing is read or written."""
    if gradient.device.type == "cpu":
        return gradient if factor.item() == 1 else gradient.mul_(factor.item())
    if runs_triton(gradient.device, gradient.dtype):
        from .rows.triton_rows import scale_

        return scale_(gradient, factor)
    # not mul_(factor), which would first round the factor to a 16-bit gradient's type
    return gradient.copy_(gradient.to(accumulation_dtype(gradient.dtype)) * factor)
