"""The row operations in Triton: one program per row of logits, on CUDA, ROCm, XPU or, for tests, Triton's interpreter.

    statistics         reads a row once
    loss_and_gradient  one kernel for the built-in objectives: reads the row, forms the token's loss and derivatives,
                       reads it again and writes its gradient; for any other callable two kernels, with the callable
                       between them on n-long vectors
    gradient           reads a row, writes its gradient

Logits are fp32. A 16-bit gradient goes to rows of its own, an fp32 one over the logits: a thread then overwrites what
it has read itself, but for the target's logit, which all threads read before any of them writes.

A row of logits starts on a 64-byte boundary and its stride is a multiple of 16 numbers, whatever V is: see head.py.
Loads run to the padded end, so that they stay 16 bytes wide, and what lies past V is replaced once the soft cap has
been applied.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
import triton
from torch import Tensor

from ..extras import ExtrasBuffer
from ..head import Head
from ..objectives.objective import Objective, Tokens, TokenStats
from . import Coefs, Normalizer, in_three_steps, tuning
from .triton_kernels import _gradient_kernel, _loss_gradient_kernel, _statistics_kernel
from .triton_objectives import columns, twin
from .triton_vectors import _prepare_kernel, _scale_kernel, _scored_kernel

SCALE, SCORED, PREPARE = tuning.Launch(4096, 8), tuning.Launch(1024, 4), tuning.Launch(2048, 8)
PROGRAMS = 8  # per multiprocessor that scale a gradient: each reads one number and, mostly, leaves


class TritonRows:
    """RowOps (see rows/) on fp32 logits whose rows are padded (see Call.logits_buffer)."""

    def statistics(
        self, logits: Tensor, target: Tensor, head: Head, extras: ExtrasBuffer | None = None
    ) -> tuple[TokenStats, Normalizer]:  # (n, V), (n,)
        n = len(logits)
        logprobs, entropy, logsumexp, *normalizer = (logits.new_empty(n) for _ in range(6))
        m, log_s, mean = normalizer
        smooth = None if head.smooth is None else logits.new_empty(n)
        grid, options = _launch("statistics", logits)
        with device_of(logits):
            _statistics_kernel[grid](
                logits_ptr=logits, target_ptr=target, logprob_ptr=logprobs, entropy_ptr=entropy,
                logsumexp_ptr=logsumexp, smooth_sum_ptr=smooth, m_ptr=m, log_s_ptr=log_s, mean_ptr=mean,
                **_of_head(head), **_of_extras(extras), **_of_rows(logits), **options,
            )  # fmt: skip
        if extras is not None:
            extras.take_entries(logits, head.bias)
            extras.normalize(partial(_score_, head), m, log_s)
        return TokenStats(logprobs, entropy, logsumexp, smooth), Normalizer(m, log_s, mean)

    def loss_and_gradient(
        self, logits: Tensor, dlogits: Tensor, tokens: Tokens, weight: Tensor, objective: Objective, head: Head,
        extras: ExtrasBuffer | None = None,
    ) -> tuple[TokenStats, Tensor]:  # (n, V), (n, V), (n,)  # fmt: skip
        if (code := twin(objective, tokens)) is None:
            return in_three_steps(self, logits, dlogits, tokens, weight, objective, head, extras)
        loss, logprobs, entropy, logsumexp = (logits.new_empty(len(logits)) for _ in range(4))
        normalizer = None
        if extras is not None:
            extras.take_entries(logits, head.bias)  # before the gradient is written over them
            normalizer = logits.new_empty(2, len(logits))
        grid, options = _launch("loss_gradient", logits)
        if extras is not None:  # which take the registers that a loop with other hints would spill (sm_80)
            options["BACKWARD"] = False
        with device_of(logits):
            _loss_gradient_kernel[grid](
                logits_ptr=logits, dlogits_ptr=dlogits, target_ptr=tokens.target, weight_ptr=weight,
                live_ptr=tokens.get("live"), columns=columns(objective, tokens), numbers=code.numbers,
                FORMULA=code.formula, OBJECTIVE=code.structure,
                smooth_total_ptr=_total(head), loss_ptr=loss, logprob_ptr=logprobs, entropy_ptr=entropy,
                logsumexp_ptr=logsumexp, normalizer_ptr=normalizer,
                **_of_head(head), **_of_extras(extras), **_of_rows(logits, dlogits), **options,
            )  # fmt: skip
        if extras is not None:
            extras.normalize(partial(_score_, head), *normalizer)
        return TokenStats(logprobs, entropy, logsumexp), loss

    def gradient(
        self, logits: Tensor, dlogits: Tensor, target: Tensor, normalizer: Normalizer, coefs: Coefs, head: Head
    ) -> None:  # (n, V), (n, V), (n,)
        g, h, k, u = (None if coef is None else coef.contiguous() for coef in (*coefs, None)[:4])
        grid, options = _launch("gradient", logits)
        with device_of(logits):
            _gradient_kernel[grid](
                logits_ptr=logits, dlogits_ptr=dlogits, target_ptr=target,
                m_ptr=normalizer.shift, log_s_ptr=normalizer.log_total, mean_ptr=normalizer.mean,
                g_ptr=g, h_ptr=h, k_ptr=k, u_ptr=u, smooth_total_ptr=_total(head),
                **_of_head(head), **_of_rows(logits, dlogits), **options,
            )  # fmt: skip


def scale_(x: Tensor, factor: Tensor) -> Tensor:  # any shape, ()
    """x *= factor (on x's device) without a host synchronisation, and for nothing when it is 1."""
    grid = (min(triton.cdiv(x.numel(), SCALE.block), PROGRAMS * tuning.multiprocessors(x.device)),)
    with device_of(x):
        _scale_kernel[grid](
            x_ptr=x, factor_ptr=factor.float(), count=x.numel(), BLOCK=SCALE.block, num_warps=SCALE.warps
        )
    return x


def prepare(live: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # (n,)
    """(targets, 0 where dead; token weights, 0 where dead; a 0 on the device) in one launch. Without weights each is
    1 / (number of live tokens)."""
    count = target.numel()
    safe = torch.empty_like(target)
    room = target.new_empty(count + 1, dtype=torch.float32)
    with device_of(target):
        _prepare_kernel[(1,)](
            live_ptr=live, target_ptr=target, weight_ptr=weight, safe_ptr=safe, out_ptr=room, count=count,
            BLOCK=PREPARE.block, num_warps=PREPARE.warps,
        )  # fmt: skip
    return safe, room[:-1], room[-1]


def _score_(head: Head, a: Tensor) -> None:  # (n, k)
    """a + b of some entries → z in place, by the kernels' own tanh and division: torch's round otherwise at times."""
    with device_of(a):
        _scored_kernel[(triton.cdiv(a.numel(), SCORED.block),)](
            a_ptr=a, temperature_ptr=_temperatures(head), count=a.numel(), k=a.shape[1], head=head.numbers,
            BLOCK=SCORED.block, num_warps=SCORED.warps,
        )  # fmt: skip


def _of_head(head: Head) -> dict[str, object]:
    """A head as the row kernels take it."""
    return {
        "bias_ptr": head.bias,
        "smooth_ptr": head.smooth,
        "temperature_ptr": _temperatures(head),
        "head": head.numbers,
    }


def _of_extras(extras: ExtrasBuffer | None) -> dict[str, Tensor | None]:
    results = extras and extras.results
    return {"rank_ptr": results and results.rank, "argmax_ptr": results and results.argmax}


def _of_rows(logits: Tensor, dlogits: Tensor | None = None) -> dict[str, object]:  # (n, V), (n, V)
    """Where the rows lie, and the gradient's."""
    n, vocab = logits.shape
    rows = {"rows": n, "vocab": vocab, "stride": logits.stride(0)}
    return rows if dlogits is None else {**rows, "dstride": dlogits.stride(0)}


def _launch(kernel: str, logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, launch options) of a row kernel on these logits (n, V)."""
    n, vocab = logits.shape
    settings = tuning.launch(kernel, vocab, tuning.target(logits.device))
    return settings.grid(n, logits.device), options(kernel, settings, 64 if torch.version.hip else 32)


def options(kernel: str, settings: tuning.Launch, warp_size: int) -> dict[str, int]:
    lanes = max(1, min(settings.warps * warp_size, settings.block // 4))
    walk = settings.programs is not None
    order = {"BACKWARD": settings.backward} if kernel == "loss_gradient" else {}
    return {"BLOCK": settings.block, "LANES": lanes, "WALK": walk, "num_warps": settings.warps, **order}


def _temperatures(head: Head) -> Tensor | None:
    """(n,) where each row has its own."""
    return head.temperature.contiguous() if isinstance(head.temperature, Tensor) else None


def _total(head: Head) -> Tensor | None:
    return None if head.smooth is None else head.smooth.sum()


def device_of(x: Tensor):  # any shape
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
