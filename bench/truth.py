"""How wrong a provider is: its loss, statistics and gradients against fp64, on a sample of rows and of head entries.

The statistics of every token are computed once in fp64 with the formulas of `srft_kernels.reference`; gradients only of
the sampled rows of x and W, so that it costs one fp64 product. Where that product would take too long (a million tokens
on a device that is slow in fp64), only the sampled tokens are looked at, and `Truth.unchecked` says what is not: the
loss and dW, which all tokens add to.

What may be wrong by how much is not a number of ours but of eager PyTorch's, in the same type on the same inputs: see
`allowances`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.objectives.objective import differentiate

from .cases import TASKS, Task
from .inputs import Inputs

ROWS = 256  # sampled tokens; their targets are the sampled target entries of the head
OTHERS = 2048  # sampled entries that are nobody's target: small gradients, which those of targets would hide in a norm
AFFORDABLE = 15.0  # seconds of fp64 product for the statistics of all tokens
YARDSTICK = 1024  # tokens on which eager PyTorch says how large an error is honest

# ‖out − truth‖ / ‖truth‖ that no honest kernel exceeds: what is allowed where eager PyTorch cannot tell.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# Allowed however exact eager is: one rounding of the result into the inputs' type; for fp32, sums in another order, and
# an entropy of 0.1 nats as the difference of two numbers of the size of the logits.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2**-11, torch.bfloat16: 2**-8}
FACTOR = 3  # of eager's error: twice is what this package's own tests allow, the rest is for the sampling
# ... and of a gradient's length: a kernel whose gradients are 2 % too long has a wrong factor somewhere. Rounding has
# no such direction, so this stays sharp where 16-bit logits of ±30 make single elements wrong by several per cent.
SCALE = 0.02


@dataclass(frozen=True)
class Truth:
    """Sampled values in fp64 by name, how to take the same sample of a provider's results, and what they may differ by.

    places     indices of the sample in each result: tokens among N, entries among V
    ignored    (N,) tokens whose dx has to be exactly 0; None where there are none
    allowed    by name of an error
    unchecked  what this says nothing of, in words
    """

    values: dict[str, Tensor]
    places: dict[str, Tensor]
    ignored: Tensor | None = None
    unchecked: str = ""
    allowed: dict[str, float] = field(default_factory=dict)

    def errors(self, results: dict[str, Tensor | None]) -> dict[str, float]:
        """‖out − truth‖ / ‖truth‖ of each result that is there: loss, logprobs, entropy (N,), dx (N, H), dW (V, H).

        "dW" is of entries that are targets, "dW others" of entries that are nobody's. "dx scale" and the like are the
        part along the truth, |⟨out, truth⟩ / ‖truth‖² − 1|. "dx ignored" is ‖dx‖ of ignored tokens over the truth's.
        """
        found = {}
        for name, reference in self.values.items():
            result = name.removesuffix(" others")
            if (value := results.get(result)) is None:
                continue
            value = (value[self.places[name]] if name in self.places else value).detach().to(reference)
            scale = self.values["magnitude"] if name == "loss" else reference.norm()
            found[name] = finite((value - reference).norm() / scale.clamp_min(1e-300))
            if result in ("dx", "dW"):
                along = (value * reference).sum() / reference.square().sum().clamp_min(1e-300)
                found[f"{name} scale"] = finite((along - 1).abs())
        if self.ignored is not None and (dx := results.get("dx")) is not None:
            found["dx ignored"] = finite(dx[self.ignored].double().norm() / self.values["dx"].norm())
        return found

    def past(self, errors: dict[str, float]) -> dict[str, float]:
        """What is allowed of the errors that are not within it."""
        return {name: self.allowed[name] for name, error in errors.items() if not error <= self.allowed[name]}

    def verdict(self, errors: dict[str, float]) -> str:
        """Why a provider with these errors is wrong, in words; empty where it is right."""
        if not errors:
            return "no result to check"
        past = [f"{name} {errors[name]:.2g} (allowed {limit:.2g})" for name, limit in self.past(errors).items()]
        return f"error {', '.join(past)}" if past else ""


def finite(error: Tensor) -> float:
    return float(error) if error.isfinite() else float("inf")


@torch.no_grad()
def truth(inputs: Inputs, task: Task, seed: int = 0) -> Truth:
    found = sampled(inputs, task, seed)
    return replace(found, allowed=allowances(inputs, task, found))


def allowances(inputs: Inputs, task: Task, reference: Truth) -> dict[str, float]:
    """FACTOR times eager PyTorch's error on the first YARDSTICK live tokens against their own truth, at least FLOOR.

    The whole case would often not fit into memory in eager. TOLERANCE where not even this does.
    """
    from .peers import eager  # which needs this package's providers

    dtype = inputs.input.dtype
    few = inputs.of(inputs.live.nonzero()[:YARDSTICK, 0])
    whole = len(few.target) == len(inputs.target)
    name = next(name for name, of in TASKS.items() if of == task)
    try:
        with torch.enable_grad():
            able = eager(str(inputs.input.device))
            results = able.call("scoring")(few) | {k: v for k, v in able.call(name)(few).items() if v is not None}
        errors = (reference if whole else sampled(few, task, 0)).errors(results)
    except torch.cuda.OutOfMemoryError:
        errors = {}
    honest = {name: error for name, error in errors.items() if error < float("inf")}
    allowed = {}
    for name in ("loss", "logprobs", "entropy", "dx", "dW", "dW others"):
        allowed[name] = max(FLOOR[dtype], FACTOR * honest[name]) if name in honest else TOLERANCE[dtype]
    if task.allowed:  # what is left out of dW is most of its small entries
        allowed |= {name: max(allowed[name], task.allowed) for name in ("dx", "dW")} | {"dW others": float("inf")}
    for name in ("dx", "dW", "dW others"):
        along = f"{name} scale"
        allowed[along] = min(allowed[name], max(SCALE, 2 * honest.get(along, 0.0)))
    return allowed | {"dx ignored": 0.0}


@torch.no_grad()
def sampled(inputs: Inputs, task: Task, seed: int) -> Truth:
    """The truth, without what may differ from it."""
    generator = torch.Generator().manual_seed(seed)
    live = inputs.live.nonzero()[:, 0]
    sample = torch.randperm(len(live), generator=generator)[:ROWS].sort().values.to(live.device)
    whole = 2 * len(live) * inputs.weight.numel() <= AFFORDABLE * rate(str(live.device))
    used = live if whole else live[sample]  # the tokens whose statistics are computed
    at = sample if whole else torch.arange(len(used), device=live.device)  # the sample among them
    weight = inputs.weight.double()
    target = inputs.target[used]
    stats = statistics(inputs.input[used], weight, target)
    values = {"logprobs": stats.logprobs[at], "entropy": stats.entropy[at]}
    places = dict.fromkeys(("logprobs", "entropy", "dx"), live[sample])
    if task.objective is None:
        return Truth(values, places)
    tokens = sk.Tokens(target, **{name: column[used].double() if column.is_floating_point() else column[used]
                                  for name, column in inputs.columns.items()})  # fmt: skip
    share = torch.full_like(stats.logprobs, 1 / len(live))
    loss, coefs = differentiate(task.objective, stats, tokens, share)
    values["dx"] = logit_gradient(inputs, used[at], weight, None, stats, at, coefs) @ weight
    ignored = ~inputs.live if len(live) < len(inputs.target) else None
    if not whole:
        return Truth(values, places, ignored, f"the loss and dW, and all but {len(used)} tokens, are not checked")
    values |= {"loss": (loss * share).sum(), "magnitude": (loss * share).abs().sum()}
    if not task.frozen:
        nobodys = torch.ones(len(weight), dtype=torch.bool, device=live.device).index_fill(0, target, False).nonzero()
        chosen = torch.randperm(len(nobodys), generator=generator)[:OTHERS].to(live.device)
        for name, entries in (("dW", target[at].unique()), ("dW others", nobodys[chosen, 0])):
            if len(entries):
                values[name], places[name] = head_gradient(inputs, used, weight, entries, stats, coefs), entries
    return Truth(values, places, ignored)


@lru_cache
def rate(device: str) -> float:
    """fp64 flops per second of a matrix product; it differs a hundredfold between GPUs of one generation."""
    size = 4096 if device.startswith("cuda") else 512
    a = torch.ones(size, size, dtype=torch.float64, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def statistics(x: Tensor, weight: Tensor, target: Tensor) -> sk.TokenStats:
    """ℓ, H, lse (n,) in fp64, in chunks of half a gigabyte."""
    chunk = max(1, 2**26 // len(weight))
    parts = [
        sk.reference.token_stats(x[i : i + chunk].double() @ weight.t(), target[i : i + chunk]).fields()[:3]
        for i in range(0, len(x), chunk)
    ]
    return sk.TokenStats(*(torch.cat(fields) for fields in zip(*parts)))


def head_gradient(
    inputs: Inputs,
    used: Tensor,  # (n,) tokens of `stats`
    weight: Tensor,  # (V, H) fp64
    entries: Tensor,  # (m,)
    stats: sk.TokenStats,
    coefs: tuple[Tensor | None, ...],
) -> Tensor:
    """∂L/∂W of some entries (m, H): the sum over all tokens of dz x, in chunks of them."""
    total = weight.new_zeros(len(entries), weight.shape[1])
    for at in torch.arange(len(used), device=used.device).split(2**14):
        dz = logit_gradient(inputs, used[at], weight, entries, stats, at, coefs)
        total.addmm_(dz.t(), inputs.input[used[at]].double())
    return total


def logit_gradient(
    inputs: Inputs,
    places: Tensor,  # (n,) tokens
    weight: Tensor,  # (V, H) fp64
    entries: Tensor | None,  # (m,) or None: all V
    stats: sk.TokenStats,
    at: Tensor,  # (n,) the tokens among those of `stats`
    coefs: tuple[Tensor | None, ...],  # derivatives of the loss to ℓ, H, lse
) -> Tensor:
    """∂L/∂z (n, V or m): g(1[v = y] − p_v) − h p_v(log p_v + H) + k p_v."""
    g, h, k = (torch.zeros_like(stats.logprobs[at]) if c is None else c[at] for c in coefs[:3])
    columns = torch.arange(len(weight), device=weight.device) if entries is None else entries
    z = inputs.input[places].double() @ (weight if entries is None else weight[entries]).t()
    log_p = z - stats.logsumexp[at, None]
    p = log_p.exp()
    hit = (columns[None] == inputs.target[places, None]).to(p)
    return g[:, None] * (hit - p) - h[:, None] * p * (log_p + stats.entropy[at, None]) + k[:, None] * p
