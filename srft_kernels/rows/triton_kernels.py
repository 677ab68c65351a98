"""The row kernels in Triton: one program per row of logits (or walking over several), statistics and gradients.

Logits are fp32; a gradient is written over them, or to rows of its own. Device code alone: what launches it, and how
rows lie in memory, is in triton_rows.py. A kernel is compiled once for any number of rows. `head` has the numbers that
logits are scored with (head.Numbers), None for what changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_objectives import _expm1, token_loss


@triton.jit
def _tanh(x):
    """tanh to 2 ulp, a quarter of one on average: below 0.8 x + x³ P(x²), with P fitted to 4e-9 of the result; above,
    what is taken from 1 is at most a third of it, and so are the errors of exponential and division."""
    x2 = x * x
    p = 0.02130298 + x2 * (-0.00740955 + x2 * 0.00158475)
    p = -0.33333297 + x2 * (0.13332221 + x2 * (-0.05385233 + x2 * p))
    e = tl.exp(-2 * tl.abs(x))
    tail = 1 - 2 * e / (1 + e)
    return tl.where(x2 < 0.64, x + x * (x2 * p), tl.where(x < 0, -tail, tail))


@triton.jit
def _exp(x):
    """e^x for x ≤ 0 by the device's base-2 exponential alone: results under 2⁻¹²⁶ may be 0, which tl.exp pays for.

    x is a difference already: log₂e folded into the subtraction would round away what large logits differ by.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _rounded_product(x, factor):
    """x · factor, rounded. A plain product may be fused with what is subtracted from it later, here but not where the
    maximum is taken: the largest logit would not be 0 above itself, but off by what rounding took from it."""
    return tl.fma(x, factor, 0.0)


@triton.jit
def _load(ptr, columns, stride, TAIL: tl.constexpr, KEEP: tl.constexpr):
    """Columns of a row, or of a vector that is padded like one; zeros past the padding. KEEP is a hint to L2."""
    if TAIL:
        return tl.load(ptr + columns, mask=columns < stride, other=0.0, eviction_policy=KEEP)
    else:
        return tl.load(ptr + columns, eviction_policy=KEEP)


@triton.jit
def _raw(row_ptr, bias_ptr, columns, stride, TAIL: tl.constexpr, KEEP: tl.constexpr):
    """a + b of some columns of a row; anything past the vocabulary."""
    a = _load(row_ptr, columns, stride, TAIL, KEEP)
    if bias_ptr is not None:
        a += _load(bias_ptr, columns, stride, TAIL, "")
    return a


@triton.jit
def _logits(
    row_ptr, bias_ptr, columns, vocab, stride, head, temperature, TAIL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(z, tanh of the soft cap) of some columns of a row; z is −inf past the vocabulary, which only TAIL can reach."""
    return _scored(_raw(row_ptr, bias_ptr, columns, stride, TAIL, KEEP), columns, vocab, head, temperature, TAIL)


@triton.jit
def _scored(a, columns, vocab, head, temperature, TAIL: tl.constexpr):
    if head.scale is not None:
        a = _rounded_product(a, head.scale)
    level = a
    if head.softcap is not None:
        level = _tanh(tl.div_rn(a, head.softcap))
        a = _rounded_product(level, head.softcap)
    if temperature is not None:
        a = tl.div_rn(a, temperature)
    if TAIL:
        a = tl.where(columns < vocab, a, -float("inf"))  # after the cap, which would make it finite
    return a, level


@triton.jit
def _through_scale(dz, head, temperature):
    """A derivative to z as one to what the soft cap made, or, without one, to a + b."""
    if temperature is not None:
        dz = dz / temperature
    if head.scale is not None:
        dz = dz * head.scale
    return dz


@triton.jit
def _through_cap(dz, level, head):
    """Past the soft cap's slope, from its tanh."""
    if head.softcap is not None:
        dz = dz * (1 - level * level)
    return dz


@triton.jit
def _statistics(
    row_ptr, target, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
    RANK: tl.constexpr, ARGMAX: tl.constexpr, BACKWARD: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(ℓ, H, lse, smooth, max, log Σ e^d, Σ p·d, rank, argmax) of a row, and d and the cap's tanh at its target.

    Online, in one read. Over blocks run, in each of LANES (the program's threads) apart, the maximum m, s = Σ e^d and
    t = Σ e^d·d for d = z − m ≤ 0. When the maximum rises by δ, every d falls by δ: t ← e^{−δ}(t − δ·s), s ← e^{−δ}·s.
    The maximum starts at −inf, so all-negative rows are ordinary rows. Threads meet once, at the end.

    BACKWARD: the row will be read again from its end, so of all rows in flight L2 should keep the last third.
    """
    inside = (target >= 0) & (target < vocab)
    place = tl.where(inside, target, 0)
    raw_target = _raw(row_ptr, bias_ptr, place, stride, False, "")
    at_target, level = _scored(raw_target, place, vocab, head, temperature, False)
    at_target = tl.where(inside, at_target, float("nan"))

    m = tl.full((LANES,), -float("inf"), tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    smooth_sum = tl.zeros((LANES,), tl.float32)
    smooth_total = tl.zeros((LANES,), tl.float32)
    rank = tl.zeros((LANES,), tl.int32)
    best = tl.full((LANES,), -float("inf"), tl.float32)
    first = tl.full((LANES,), 2147483647, tl.int32)
    smooth_shift = tl.where(tl.abs(at_target) < float("inf"), at_target, 0.0)
    whole = vocab // BLOCK * BLOCK  # only the last block has a padding to look out for
    front = 0
    if BACKWARD:
        front = whole // BLOCK * 2 // 3 * BLOCK
        for start in range(0, front, BLOCK):
            m, s, t, smooth_sum, smooth_total, rank, best, first = _add_block(
                m, s, t, smooth_sum, smooth_total, rank, best, first, smooth_shift, raw_target, start,
                row_ptr, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
                RANK, ARGMAX, False, "evict_first", LANES, BLOCK,
            )  # fmt: skip
    KEEP: tl.constexpr = "evict_last" if BACKWARD else ""
    for start in range(front, whole, BLOCK):
        m, s, t, smooth_sum, smooth_total, rank, best, first = _add_block(
            m, s, t, smooth_sum, smooth_total, rank, best, first, smooth_shift, raw_target, start,
            row_ptr, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
            RANK, ARGMAX, False, KEEP, LANES, BLOCK,
        )  # fmt: skip
    if whole < vocab:
        m, s, t, smooth_sum, smooth_total, rank, best, first = _add_block(
            m, s, t, smooth_sum, smooth_total, rank, best, first, smooth_shift, raw_target, whole,
            row_ptr, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
            RANK, ARGMAX, True, KEEP, LANES, BLOCK,
        )  # fmt: skip
    top = tl.max(m, 0)
    fall = tl.where(m == -float("inf"), 0.0, m - top)  # −inf − (−inf) is not a number; s and t are 0 there
    shrunk = _exp(fall)
    t = tl.sum(shrunk * (t + fall * s), 0)
    s = tl.sum(shrunk * s, 0)
    log_s = tl.log(s)
    d = at_target - top
    logprob = d - log_s
    smooth = tl.sum(smooth_sum, 0) + tl.sum(smooth_total, 0) * (smooth_shift - top - log_s)
    if RANK:
        rank = tl.sum(rank, 0)
    if ARGMAX:
        first = tl.min(tl.where(best == tl.max(best, 0), first, 2147483647), 0)
    return logprob, log_s - t / s, top + log_s, smooth, top, log_s, t / s, rank, first, d, level


@triton.jit
def _add_block(
    m, s, t, smooth_sum, smooth_total, rank, best, first, smooth_shift, raw_target, start,
    row_ptr, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
    RANK: tl.constexpr, ARGMAX: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # (BLOCK / 4·LANES, LANES, 4): a thread loads 16 bytes at a time and reduces the other axes of its lane alone
    steps = tl.arange(0, BLOCK // (4 * LANES)) * (4 * LANES)
    lanes = tl.arange(0, LANES) * 4
    columns = start + steps[:, None, None] + lanes[None, :, None] + tl.arange(0, 4)[None, None, :]
    a = _raw(row_ptr, bias_ptr, columns, stride, TAIL, KEEP)
    z, _ = _scored(a, columns, vocab, head, temperature, TAIL)
    if TAIL:
        a = tl.where(columns < vocab, a, -float("inf"))
    if RANK:
        rank += _of_lanes((a > raw_target).to(tl.int32))
    if ARGMAX:
        highest = tl.max(tl.max(a, 2), 0)
        where = tl.where(a == highest[None, :, None], columns, 2147483647)
        first = tl.where(highest > best, tl.min(tl.min(where, 2), 0), first)
        best = tl.maximum(best, highest)
    if smooth_ptr is not None:
        omega = _load(smooth_ptr, columns, stride, TAIL, "")
        weighted = omega * (z - smooth_shift)
        if TAIL:
            weighted = tl.where(columns < vocab, weighted, 0.0)
        smooth_sum += _of_lanes(weighted)
        smooth_total += _of_lanes(omega)
    top = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    finite_top = tl.where(top == -float("inf"), 0.0, top)
    d = z - finite_top[None, :, None]
    e = _exp(d)
    fall = tl.where(m == -float("inf"), 0.0, m - finite_top)
    shrunk = _exp(fall)
    # e is 0 below −128: 0 · (−inf) is 0 here
    t = shrunk * (t + fall * s) + _of_lanes(e * tl.maximum(d, -128.0))
    s = shrunk * s + _of_lanes(e)
    return top, s, t, smooth_sum, smooth_total, rank, best, first


@triton.jit
def _of_lanes(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, target, d, level, m, log_s, mean, g, h, k, u,
    bias_ptr, smooth_ptr, smooth_total, vocab, stride, head, temperature,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂L/∂a of a row: g(1[v=y] − p_v) − h p_v(log p_v + H) + k p_v + u(ω_v − Σω·p_v), through temperature, cap
    and scale.

    At v = y, where d and the cap's tanh are given, the sum is made as it stands and once for the row: alpha has
    rounded away what is left of k where g(1 − p_y) is almost 0.
    """
    inside = (target >= 0) & (target < vocab)
    g = tl.where(inside, g, float("nan"))  # no such column: no gradient that is right
    at = tl.where(inside, target, -1).to(tl.int32)
    if (g == 0.0) & (h == 0.0) & (k == 0.0) & (u == 0.0):  # ignored, or without advantage: nothing to read
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + columns, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=columns < stride)
    else:
        g = _through_scale(g, head, temperature)
        h = _through_scale(h, head, temperature)
        k = _through_scale(k, head, temperature)
        u = _through_scale(u, head, temperature)
        rest = k - u * smooth_total + h * mean
        logprob = d - log_s
        of_target = tl.exp(logprob) * (rest - h * tl.maximum(d, -128.0)) - g * _expm1(logprob)
        if smooth_ptr is not None:
            of_target += u * tl.load(smooth_ptr + tl.where(inside, target, 0))
        of_target = _through_cap(of_target, level, head)
        s = tl.exp(log_s)
        alpha = (rest - g) / s
        beta = -h / s
        whole = vocab // BLOCK * BLOCK
        for done in range(0, whole, BLOCK):
            start = whole - BLOCK - done if BACKWARD else done
            _write_block(
                row_ptr, out_ptr, at, of_target, start, m, alpha, beta, u,
                bias_ptr, smooth_ptr, vocab, stride, head, temperature, False, BACKWARD, BLOCK,
            )  # fmt: skip
        if whole < vocab:
            _write_block(
                row_ptr, out_ptr, at, of_target, whole, m, alpha, beta, u,
                bias_ptr, smooth_ptr, vocab, stride, head, temperature, True, BACKWARD, BLOCK,
            )  # fmt: skip


@triton.jit
def _write_block(
    row_ptr, out_ptr, target, of_target, start, m, alpha, beta, u,
    bias_ptr, smooth_ptr, vocab, stride, head, temperature,
    TAIL: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DONE: tl.constexpr = "evict_first" if BACKWARD else ""  # what is read here is dead, what is written waits long
    columns = start + tl.arange(0, BLOCK)
    z, level = _logits(row_ptr, bias_ptr, columns, vocab, stride, head, temperature, TAIL, DONE)
    d = z - m
    e = _exp(d)
    dz = e * (alpha + beta * tl.maximum(d, -128.0))  # 0 · (−inf) is 0 here
    if smooth_ptr is not None:
        dz += u * _load(smooth_ptr, columns, stride, TAIL, "")
    dz = _through_cap(dz, level, head)
    if (target >= start) & (target < start + BLOCK):
        dz = tl.where(columns == target, of_target, dz)
    if TAIL:
        dz = tl.where(columns < vocab, dz, 0.0)
        tl.store(out_ptr + columns, dz.to(out_ptr.dtype.element_ty), mask=columns < stride, eviction_policy=DONE)
    else:
        tl.store(out_ptr + columns, dz.to(out_ptr.dtype.element_ty), eviction_policy=DONE)


@triton.jit
def _stop(rows, WALK: tl.constexpr):
    """Where a program's rows end: at the last of all, or, known to the compiler, after one."""
    if WALK:
        return rows
    else:
        return tl.program_id(0) + 1


@triton.jit
def _step(WALK: tl.constexpr):
    if WALK:
        return tl.num_programs(0)
    else:
        return 1


@triton.jit(do_not_specialize=["rows"])
def _statistics_kernel(
    logits_ptr,  # (n, stride) fp32
    target_ptr,  # (n,) int64
    bias_ptr, smooth_ptr,  # (V,) fp32 or None
    logprob_ptr, entropy_ptr, logsumexp_ptr, smooth_sum_ptr,  # (n,) fp32
    m_ptr, log_s_ptr, mean_ptr,  # (n,) fp32: max, log Σ e^d, Σ p·d
    rank_ptr, argmax_ptr,  # (n,) int64 or None
    temperature_ptr,  # (n,) fp32, or None
    rows, vocab, stride, head, LANES: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    for row in tl.range(tl.program_id(0), _stop(rows, WALK), _step(WALK), disable_licm=True):
        target = tl.load(target_ptr + row)
        row_ptr = logits_ptr + row * stride.to(tl.int64)  # row · stride passes 2³¹
        temperature = head.temperature if temperature_ptr is None else tl.load(temperature_ptr + row)
        logprob, entropy, logsumexp, smooth, m, log_s, mean, rank, argmax, _, _ = _statistics(
            row_ptr, target, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
            rank_ptr is not None, argmax_ptr is not None, False, LANES, BLOCK,
        )  # fmt: skip
        if rank_ptr is not None:
            tl.store(rank_ptr + row, rank.to(tl.int64))
        if argmax_ptr is not None:
            tl.store(argmax_ptr + row, argmax.to(tl.int64))
        tl.store(logprob_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(logsumexp_ptr + row, logsumexp)
        if smooth_sum_ptr is not None:
            tl.store(smooth_sum_ptr + row, smooth)
        tl.store(m_ptr + row, m)
        tl.store(log_s_ptr + row, log_s)
        tl.store(mean_ptr + row, mean)


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    logits_ptr, dlogits_ptr,  # (n, stride) fp32; (n, dstride), the same memory if fp32
    target_ptr, m_ptr, log_s_ptr, mean_ptr,  # (n,)
    g_ptr, h_ptr, k_ptr, u_ptr,  # (n,) fp32 or None
    bias_ptr, smooth_ptr, smooth_total_ptr,  # (V,), (V,), () fp32 or None
    temperature_ptr,  # (n,) fp32, or None
    rows, vocab, stride, dstride, head,
    LANES: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    for row in tl.range(tl.program_id(0), _stop(rows, WALK), _step(WALK), disable_licm=True):
        target = tl.load(target_ptr + row)
        m = tl.load(m_ptr + row)
        log_s = tl.load(log_s_ptr + row)
        zero = log_s * 0.0
        g = zero if g_ptr is None else tl.load(g_ptr + row)
        h = zero if h_ptr is None else tl.load(h_ptr + row)
        k = zero if k_ptr is None else tl.load(k_ptr + row)
        u = zero if u_ptr is None else tl.load(u_ptr + row)
        smooth_total = zero if smooth_total_ptr is None else tl.load(smooth_total_ptr)
        row_ptr = logits_ptr + row * stride.to(tl.int64)
        temperature = head.temperature if temperature_ptr is None else tl.load(temperature_ptr + row)
        place = tl.where((target >= 0) & (target < vocab), target, 0)
        # by every thread, and reduced: so all have read it before any of them writes over it
        a = tl.max(_raw(row_ptr, bias_ptr, place + tl.zeros((LANES,), tl.int64), stride, False, ""), 0)
        z, level = _scored(a, place, vocab, head, temperature, False)
        _write_gradient(
            row_ptr, dlogits_ptr + row * dstride.to(tl.int64), target, z - m, level,
            m, log_s, tl.load(mean_ptr + row), g, h, k, u,
            bias_ptr, smooth_ptr, smooth_total, vocab, stride, head, temperature, False, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _loss_gradient_kernel(
    logits_ptr, dlogits_ptr,  # (n, stride) fp32; (n, dstride), the same memory if fp32
    target_ptr, weight_ptr, live_ptr,  # (n,) int64; fp32 token weights; boolean, or None: all are
    columns,  # annotations by name, each (n,) or None
    numbers,  # the objective's coefficients by name
    bias_ptr, smooth_ptr, smooth_total_ptr,  # (V,), (V,), () fp32 or None
    loss_ptr, logprob_ptr, entropy_ptr, logsumexp_ptr,  # (n,) fp32: weight · loss, ℓ, H, lse, 0 where dead
    normalizer_ptr,  # (2, n) fp32: max, log Σ e^d; or None
    rank_ptr, argmax_ptr,  # (n,) int64 or None
    temperature_ptr,  # (n,) fp32, or None
    rows, vocab, stride, dstride, head,
    FORMULA: tl.constexpr, OBJECTIVE: tl.constexpr, BACKWARD: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    for row in tl.range(tl.program_id(0), _stop(rows, WALK), _step(WALK), disable_licm=True):
        target = tl.load(target_ptr + row)
        row_ptr = logits_ptr + row * stride.to(tl.int64)
        temperature = head.temperature if temperature_ptr is None else tl.load(temperature_ptr + row)
        logprob, entropy, logsumexp, smooth, m, log_s, mean, rank, argmax, d, level = _statistics(
            row_ptr, target, bias_ptr, smooth_ptr, vocab, stride, head, temperature,
            rank_ptr is not None, argmax_ptr is not None, BACKWARD, LANES, BLOCK,
        )  # fmt: skip
        if rank_ptr is not None:
            tl.store(rank_ptr + row, rank.to(tl.int64))
        if argmax_ptr is not None:
            tl.store(argmax_ptr + row, argmax.to(tl.int64))
        loss, g, h, k, u = token_loss(FORMULA, OBJECTIVE, numbers, columns, row, logprob, entropy, logsumexp, smooth)
        weight = tl.load(weight_ptr + row)
        silent = weight == 0.0  # whatever loss and derivatives are, infinite or not
        tl.store(loss_ptr + row, tl.where(silent, 0.0, weight * loss))
        live = True if live_ptr is None else tl.load(live_ptr + row) != 0
        tl.store(logprob_ptr + row, tl.where(live, logprob, 0.0))
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0))
        tl.store(logsumexp_ptr + row, tl.where(live, logsumexp, 0.0))
        if normalizer_ptr is not None:
            tl.store(normalizer_ptr + row, m)
            tl.store(normalizer_ptr + rows + row, log_s)
        g = tl.where(silent, 0.0, weight * g)
        h = tl.where(silent, 0.0, weight * h)
        k = tl.where(silent, 0.0, weight * k)
        u = tl.where(silent, 0.0, weight * u)
        smooth_total = m * 0.0 if smooth_total_ptr is None else tl.load(smooth_total_ptr)
        _write_gradient(
            row_ptr, dlogits_ptr + row * dstride.to(tl.int64), target, d, level, m, log_s, mean, g, h, k, u,
            bias_ptr, smooth_ptr, smooth_total, vocab, stride, head, temperature, BACKWARD, BLOCK,
        )  # fmt: skip
