"""The divergence of two rows of logits, and its gradient, in Triton: one program per token.

A program reads both rows twice, or three times where the gradient needs the divergence first (all but the forward KL),
and writes the gradient as the loss kernels do: see rows/triton_rows.py, also for how rows lie.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from ..rows.triton_kernels import _logits, _through_cap, _through_scale
from ..rows.triton_rows import device_of
from .divergence import Divergence

# Columns per loop step, and of each row per warp: 8 of both rows in a thread's registers. With 16, and 2048 a step, the
# compiler spilled some (two row numbers, to fit one more program) and fewer warps were resident: kernel-notes.md.
MAX_BLOCK = 1024
ELEMENTS_PER_WARP = 256


# ---------------------------------------------------------------------------------------------------- device code


@triton.jit
def _grown(m, s, z):
    """Online over blocks: a row's maximum so far and Σ e^{z − maximum}, with one more block of z; and by what sums so
    far shrink, and the block's e^{z − maximum}."""
    top = tl.maximum(m, tl.max(z, 0))
    finite_top = tl.where(top == -float("inf"), 0.0, top)  # −inf − (−inf) is not a number
    shrunk = tl.where(m == -float("inf"), 0.0, tl.exp(m - finite_top))
    e = tl.exp(z - finite_top)
    return top, shrunk * s + tl.sum(e, 0), shrunk, e


@triton.jit
def _log_ratio(difference, least):
    """log a/b of a, b in [0, 1] from a − b and the lesser of both: of a ratio near to 1, as exact as a − b is."""
    x = tl.abs(difference) / tl.maximum(least, 1.1754944e-38)  # what so small a number is multiplied by is no larger
    y = 1 + x
    log = tl.log(y) + tl.where(x < 1, x - (y - 1), 0.0)  # with what 1 + x has rounded away
    return tl.where(difference < 0, -log, log)


@triton.jit
def _compared(zs, zt, ms, mt, ss, st, guess, beta, KIND: tl.constexpr):
    """Of some columns: (p, the divergence's terms, v) for the gradient p (v − Σ p v).

    Forward KL: the gradient is p − q, and v is q.
    Reverse KL: v is log p − log q less a guess of its mean, whose rounding error would be in every column, most of all
    in a peaked one. So are the terms; and p and the terms are still to be divided by `ss`.
    Jensen–Shannon: v is log p/m less what it is where q = guess · p: near to that it is as exact as it is small. It is
    still to be multiplied by 1 − β. The terms are the teacher's, q log q/m. Ratios to the mixture are bounded, so their
    logarithms need no logits.
    """
    ds, dt = zs - ms, zt - mt
    p, q = tl.exp(ds), tl.exp(dt)
    if KIND == "reverse_kl":
        v = tl.where(p == 0, 0.0, ds - dt - guess)
        terms = p * v
    elif KIND == "forward_kl":
        q = q / st
        p = p / ss
        v = q
        terms = tl.where(q == 0, 0.0, q * (dt - ds + tl.log(ss / st)))
    else:
        p *= 1 / ss
        q *= 1 / st
        share = 1 - beta  # 0 if β is rounded to 1: so is the gradient then
        mixture = share * p + beta * q
        v = _log_ratio(beta * (guess * p - q), tl.minimum((share + beta * guess) * p, mixture))
        terms = q * _log_ratio(share * (q - p), tl.minimum(q, mixture))
    return p, terms, v


@triton.jit
def _distillation_kernel(
    student_ptr, teacher_ptr,  # (n, stride) fp32 each
    dlogits_ptr,  # (n, dstride), the student's memory if fp32; None: the divergences alone
    weight_ptr,  # (n,) fp32 token weights
    bias_ptr, teacher_bias_ptr,  # (V,) fp32 or None
    out_ptr,  # (n,) fp32
    vocab, stride, dstride, head, teacher_head, beta,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2³¹
    student_ptr += row * stride
    teacher_ptr += row * stride
    weight = tl.load(weight_ptr + row)
    zero = weight * 0.0
    ms, mt, ss, st = zero - float("inf"), zero - float("inf"), zero, zero
    guess = zero  # reverse KL: Σ e^{zs − ms} ((zs − ms) − (zt − mt)) so far; Jensen–Shannon: Σ e^{zs − ms} e^{zt − mt}
    square = zero  # Jensen–Shannon: Σ e^{2 (zs − ms)} so far
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zs, _ = _logits(student_ptr, bias_ptr, columns, vocab, stride, head, head.temperature, True, "")
        zt, _ = _logits(
            teacher_ptr, teacher_bias_ptr, columns, vocab, stride, teacher_head, teacher_head.temperature, True, ""
        )
        top_s, grown_s, shrunk_s, e = _grown(ms, ss, zs)
        top_t, st, shrunk_t, f = _grown(mt, st, zt)
        if KIND == "reverse_kl":
            guess = tl.exp(ms - top_s) * (guess + ss * ((ms - top_s) - (mt - top_t)))
            guess = tl.where(tl.abs(guess) < float("inf"), guess, 0.0)  # no maximum yet, or nothing to guess at
            guess += tl.sum(tl.where(e == 0, 0.0, e * ((zs - top_s) - (zt - top_t))), 0)
        if KIND == "jensen_shannon":
            guess = shrunk_s * shrunk_t * guess + tl.sum(e * f, 0)
            square = shrunk_s * shrunk_s * square + tl.sum(e * e, 0)
        ms, mt, ss = top_s, top_t, grown_s
    if KIND == "reverse_kl":
        guess = tl.where(tl.abs(guess) < float("inf"), guess / ss, 0.0)
    if KIND == "jensen_shannon":
        guess = tl.div_rn(guess, square) * tl.div_rn(ss, st)  # c of q ≈ c p, fitted by least squares

    value, mean = zero, zero
    if KIND != "forward_kl" or dlogits_ptr is None:  # else the next loop does it
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zs, _ = _logits(student_ptr, bias_ptr, columns, vocab, stride, head, head.temperature, True, "")
            zt, _ = _logits(
                teacher_ptr, teacher_bias_ptr, columns, vocab, stride, teacher_head, teacher_head.temperature, True, "",
            )  # fmt: skip
            p, terms, v = _compared(zs, zt, ms, mt, ss, st, guess, beta, KIND)
            value += tl.sum(terms, 0)
            if KIND == "jensen_shannon":
                mean += tl.sum(p * v, 0)
    slope = _through_scale(weight, head, head.temperature)
    if KIND == "reverse_kl":
        mean = value / ss
        value = mean + guess - tl.log(ss / st)
        slope = slope / ss
    if KIND == "jensen_shannon":
        share = 1 - beta
        at_guess = _log_ratio(beta * (1 - guess), tl.minimum(share + beta * guess, 1.0))
        value = share * (mean + at_guess) + beta * value
        slope = share * slope

    if dlogits_ptr is not None:
        dlogits_ptr += row * dstride
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zs, level = _logits(student_ptr, bias_ptr, columns, vocab, stride, head, head.temperature, True, "")
            zt, _ = _logits(
                teacher_ptr, teacher_bias_ptr, columns, vocab, stride, teacher_head, teacher_head.temperature, True, "",
            )  # fmt: skip
            p, terms, v = _compared(zs, zt, ms, mt, ss, st, guess, beta, KIND)
            if KIND == "forward_kl":
                value += tl.sum(terms, 0)
                dz = p - v
            else:
                dz = p * (v - mean)
            dz = tl.where(weight == 0, 0.0, slope * dz)  # whatever the derivative is, infinite or not
            dz = _through_cap(dz, level, head)
            dz = tl.where(columns < vocab, dz, 0.0)
            tl.store(dlogits_ptr + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=columns < stride)
    tl.store(out_ptr + row, value)


# --------------------------------------------------------------------------------------------------------- launch


class TritonDivergenceRows:
    """DivergenceRows (see divergence.py) on fp32 logits with padded rows of one stride."""

    def divergence_and_gradient(
        self, student: Tensor, teacher: Tensor, dlogits: Tensor | None, weight: Tensor, divergence: Divergence,
        head: Head, teacher_head: Head,
    ) -> Tensor:  # (n, V), (n, V), (n, V), (n,)  # fmt: skip
        n, vocab = student.shape
        out = student.new_empty(n)
        with device_of(student):
            _distillation_kernel[(n,)](
                student_ptr=student, teacher_ptr=teacher, dlogits_ptr=dlogits, weight_ptr=weight,
                bias_ptr=head.bias, teacher_bias_ptr=teacher_head.bias, out_ptr=out,
                vocab=vocab, stride=student.stride(0), dstride=0 if dlogits is None else dlogits.stride(0),
                head=head.numbers, teacher_head=teacher_head.numbers, beta=divergence.beta, KIND=divergence.kind,
                **launch(vocab),
            )  # fmt: skip
        return out


def launch(vocab: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(vocab), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(1, min(block // ELEMENTS_PER_WARP, 16))}
