"""Inputs that break loss heads, the fp64 truth about them, and the rule that a result is held to.

The rule: err(ours, fp64) ≤ 2 · err(eager full-logits PyTorch in the same input type, fp64) + a few ulps of the output.

Numbers lie on a grid of eighths (scaled by powers of two), so that logits are exact in fp32 whatever the order of
summation: what is compared is the softmax, the entropy and the gradients, not the luck of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import srft_kernels as sk
from srft_kernels.head import aligned_size
from srft_kernels.rows import RowOps

BACKENDS = ["torch"]
ULPS = 4
SUMS = ("logprobs", "entropy", "loss")
IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """A call of the loss head: x (N, H), W (V, H), y (N) with ignored tokens, b (V) or None, softcap= and the like."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    head: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> Tensor:
        return self.target != IGNORED

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Copies of x, W and (where there is one) b that ask for gradients."""
        tensors = [self.input, self.weight] + ([] if self.bias is None else [self.bias])
        return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def grid(*shape: int, generator: torch.Generator) -> Tensor:
    """Eighths in [−1, 1], exact in every floating type."""
    return torch.randint(-8, 9, shape, generator=generator) / 8


def _random(x: Tensor, w: Tensor, y: Tensor):
    return x, w, None, {}


def _gaussian(x: Tensor, w: Tensor, y: Tensor):
    generator = torch.Generator().manual_seed(len(x))
    return torch.randn(x.shape, generator=generator), torch.randn(w.shape, generator=generator) / 4, None, {}


def _peaked(x: Tensor, w: Tensor, y: Tensor):  # p of the target within 1e-3 … 1e-9 of 1
    return w[y.clamp(min=0)] * 4, w, None, {}


def _flat(x: Tensor, w: Tensor, y: Tensor):
    return x * 2.0**-8, w, None, {}


def _offset(by: float):
    """All logits around `by`, with ordinary differences."""

    def build(x: Tensor, w: Tensor, y: Tensor):
        x, w = x.clone(), w.clone()
        x[:, 0], w[:, 0] = 2.0**5, by / 2.0**5
        return x, w, None, {}

    return build


def _scaled(log2: int):
    """Random logits of magnitude 2^log2: one of them takes all the probability."""

    def build(x: Tensor, w: Tensor, y: Tensor):
        return x * 2.0 ** (log2 // 2), w * 2.0 ** (log2 - log2 // 2), None, {}

    return build


def _tied(log2: int):
    """Every logit is exactly 2^log2."""

    def build(x: Tensor, w: Tensor, y: Tensor):
        x, w = torch.zeros_like(x), torch.zeros_like(w)
        x[:, 0], w[:, 0] = 2.0 ** (log2 // 2), 2.0 ** (log2 - log2 // 2)
        return x, w, None, {}

    return build


def _biased(x: Tensor, w: Tensor, y: Tensor):
    return x, w, torch.arange(len(w)) % 17 / 8 - 1, {}


def _banned(x: Tensor, w: Tensor, y: Tensor):  # every third entry is −inf, targets spared
    bias = torch.zeros(len(w))
    bias[1::3] = -torch.inf
    bias[y[y >= 0]] = 0
    return x, w, bias, {}


def _padded(x: Tensor, w: Tensor, y: Tensor):
    """Head rows that do not exist hold garbage; the caller's targets stay below them."""
    w, size = w.clone(), max(1, len(w) - 5)
    w[size:] = torch.nan
    y[y >= size] = size - 1
    return x, w, None, {"vocab_size": size}


def _with_head(build: Callable, **head: Any):
    def built(x: Tensor, w: Tensor, y: Tensor):
        x, w, bias, more = build(x, w, y)
        return x, w, bias, {**more, **head}

    return built


KINDS: dict[str, Callable] = {
    "random": _random,
    "gaussian": _gaussian,
    "peaked": _peaked,
    "flat": _flat,
    "all_negative": _offset(-(2.0**10)),
    "offset_1e5": _offset(2.0**17),
    "huge_1e4": _scaled(13),
    "huge_1e8": _scaled(27),
    "huge_1e30": _scaled(100),
    "tied_1e4": _tied(13),
    "tied_1e30": _tied(100),
    "bias": _biased,
    "banned": _banned,
    "padded": _padded,
    "hot": _with_head(_random, temperature=1.7),
    "cold": _with_head(_random, temperature=0.125),
    "scale": _with_head(_biased, logit_scale=0.3),
    "scale_huge": _with_head(_scaled(17), logit_scale=2.3),
    "softcap": _with_head(_biased, softcap=2.0),
    "softcap_saturated": _with_head(_scaled(6), softcap=30.0),
    "softcap_huge": _with_head(_scaled(100), softcap=30.0),
    "softcap_cold": _with_head(_scaled(4), softcap=50.0, temperature=2.0**-9),
    "everything": _with_head(lambda x, w, y: (*_padded(x, w, y)[:2], *_biased(x, w, y)[2:3], _padded(x, w, y)[3]),
                             logit_scale=1.3, softcap=4.0, temperature=0.7),
}  # fmt: skip
FP16_KINDS = [kind for kind in KINDS if not kind.endswith(("1e5", "1e8", "1e30", "_huge"))]


def problem(
    kind: str = "random",
    tokens: int = 13,
    hidden: int = 16,
    vocab: int = 131,
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.25,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x, w = grid(tokens, hidden, generator=generator), grid(vocab, hidden, generator=generator)
    y = torch.randint(vocab, (tokens,), generator=generator)
    y[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    if ignored < 1:
        y[0] = vocab // 2
    x, w, bias, head = KINDS[kind](x, w, y)
    return Problem(x.to(dtype), w.to(dtype), y, None if bias is None else bias.to(dtype), head)


def plans(backend: str, passes: int | None = None, chunks: tuple[int, ...] = (1, 5, 64)) -> list[sk.Plan]:
    """Chunkings from one row at a time to everything at once."""
    return [sk.Plan(backend=backend, chunk_rows=rows, block_rows=min(rows, 3), passes=passes) for rows in chunks]


def buffer(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # (n, V)
    """A copy in rows as the engine lays them out."""
    n, vocab = logits.shape
    return logits.new_empty(n, aligned_size(vocab), dtype=dtype)[:, :vocab].copy_(logits)


def in_one_pass(rows: RowOps, logits: Tensor, *arguments: Any, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """(statistics, losses, ∂L/∂a) of row operations: over the logits, or in rows of its own of another type."""
    dlogits = logits if dtype in (None, logits.dtype) else buffer(logits, dtype).fill_(torch.nan)
    return *rows.loss_and_gradient(logits, dlogits, *arguments), dlogits


def in_second_pass(rows: RowOps, logits: Tensor, *arguments: Any, dtype: torch.dtype | None = None) -> Tensor:
    dlogits = logits if dtype in (None, logits.dtype) else buffer(logits, dtype).fill_(torch.nan)
    rows.gradient(logits, dlogits, *arguments)
    return dlogits


def scored(a: Tensor, head: dict[str, Any], tanh: Callable = torch.tanh) -> Tensor:
    """z of logits a + b (n, V): scale, soft cap, temperature (one, or one of each row), in this order."""
    z = a * head.get("logit_scale", 1.0)
    if cap := head.get("softcap"):
        z = cap * tanh(z / cap)
    temperature = head.get("temperature", 1.0)
    return z / (temperature[:, None].to(z.dtype) if isinstance(temperature, Tensor) else temperature)


def full_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    dtype: torch.dtype | None = None,
    plan: sk.Plan | None = None,
) -> sk.TokenStats:
    """ℓ, H, lse of the live tokens as one writes them with full logits; `dtype` is the type after the projection.

    The projection is made in one product, or in products of as many rows as a plan's: BLAS libraries sum in other
    orders for one or two rows than for many.
    """
    size = problem.head.get("vocab_size")
    x, bias = input[problem.live], None if bias is None else bias[:size]
    chunks = plan.chunks(len(x)) if plan and len(x) else [slice(None)]
    z = torch.cat([F.linear(x[chunk], weight[:size], bias) for chunk in chunks])
    z = scored(z.to(dtype or z.dtype), problem.head)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    shift = z.detach().amax(-1, keepdim=True)  # torch.logsumexp has a wrong gradient where lse rounds to the maximum
    lse = shift[:, 0] + (z - shift).exp().sum(-1).log()
    return sk.TokenStats(logp.gather(1, problem.target[problem.live, None])[:, 0], entropy, lse)


@dataclass(frozen=True)
class Result:
    """Outputs by name (ℓ, H, lse per live token; loss), and gradients of the loss (dx, dW, db)."""

    values: dict[str, Tensor]

    @classmethod
    def of(cls, stats: sk.TokenStats, loss: Tensor, leaves: list[Tensor]) -> Result:
        grads = torch.autograd.grad(loss, leaves)
        named = dict(zip(("logprobs", "entropy", "logsumexp"), stats.fields()))
        named |= {"loss": loss, **dict(zip(("dx", "dW", "db"), grads))}
        return cls({name: value.detach() for name, value in named.items()})


def full(
    problem: Problem,
    objective: Callable,
    dtype: torch.dtype | None,
    logits: torch.dtype,
    plan: sk.Plan | None = None,
    **columns,
) -> Result:
    """Autograd through full logits of Σ objective / (live tokens), with inputs in `dtype` and softmax in `logits`."""
    leaves = problem.leaves(dtype)
    stats = full_statistics(*(leaves if len(leaves) == 3 else (*leaves, None)), problem, logits, plan)
    columns = {name: c[problem.live].to(logits) if c.is_floating_point() else c[problem.live]
               for name, c in columns.items()}  # fmt: skip
    loss = objective(stats, sk.Tokens(problem.target[problem.live], **columns)).sum() / max(int(problem.live.sum()), 1)
    return Result.of(stats, loss, leaves)


def truth(problem: Problem, objective: Callable, **columns: Tensor) -> Result:
    return full(problem, objective, torch.float64, torch.float64, **columns)


def eager(problem: Problem, objective: Callable, plan: sk.Plan | None = None, **columns: Tensor) -> Result:
    """What a user has without this package: the projection in the input type, `.float()`, log_softmax."""
    return full(problem, objective, None, torch.float32, plan, **columns)


def ours(problem: Problem, objective: Callable, plan: sk.Plan | None = None, **columns: Tensor) -> Result:
    leaves = problem.leaves()
    bias = leaves[2] if len(leaves) == 3 else None
    out = sk.linear_loss(
        leaves[0], leaves[1], problem.target, objective, linear_bias=bias, plan=plan, **problem.head, **columns
    )
    told = {name: getattr(out, name) for name in ("logprobs", "entropy", "logsumexp")}
    for name, value in told.items():
        assert (value[~problem.live] == 0).all(), f"{name} of ignored tokens must be 0"
    stats = sk.TokenStats(*(value[problem.live] for value in told.values()))
    return Result.of(stats, out.loss, leaves)


def error(value: Tensor, reference: Tensor) -> Tensor:
    """Largest absolute error; infinite where one is infinite or NaN and the other is not the same."""
    value = value.double()
    same = (value == reference) | (value.isnan() & reference.isnan())
    return torch.where(same, 0, (value - reference).abs().nan_to_num(nan=torch.inf)).amax() if value.numel() else 0.0


def assert_exact(ours: Result, eager: Result, truth: Result, note: object = "") -> None:
    """The rule, for every output and gradient."""
    for name, reference in truth.values.items():
        value = ours.values[name]
        assert value.shape == reference.shape, f"{name}: shape {tuple(value.shape)}"
        allowed, found = bound(name, eager.values[name], reference, value.dtype), error(value, reference)
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g} {note}"


def bound(name: str, eager: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """What the error of a result may be: twice eager's, and a few roundings that eager may be spared."""
    magnitude = reference[reference.isfinite()].abs().amax() if reference.isfinite().any() else 0.0
    allowed = 2 * error(eager, reference) + ULPS * torch.finfo(dtype).eps * magnitude
    # ℓ ≈ 0 is −log s with s ≈ 1: whoever sums s rounds it once at least
    return allowed + torch.finfo(dtype).eps / 2 if name in SUMS else allowed
