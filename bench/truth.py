"""How wrong a provider is: its loss, statistics and gradients against fp64, on a sample of rows and of head entries.

The statistics of every token are computed once in fp64 with the formulas of `srft_kernels.reference`; gradients only of
the sampled rows of x and W, so that it costs one fp64 product. Past MAX_TOKENS only the sampled tokens are looked at,
and neither the loss nor dW, which all tokens add to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.tokens import coefficients

from .cases import Task
from .inputs import Inputs

ROWS = 64  # sampled
MAX_TOKENS = 40_000
# ‖out − truth‖ / ‖truth‖ that no honest kernel exceeds. 16-bit peers round logits of ±30 to one part in 256 or 1024.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Truth:
    """Sampled values in fp64 by name, and how to take the same sample of a provider's results."""

    tokens: Tensor  # (n,) places of the sampled tokens among N
    entries: Tensor  # (m,) sampled rows of the head
    values: dict[str, Tensor]

    def errors(self, results: dict[str, Tensor | None]) -> dict[str, float]:
        """‖out − truth‖ / ‖truth‖ of each result that is there: loss, logprobs, entropy (N,), dx (N, H), dW (V, H)."""
        found = {}
        for name, reference in self.values.items():
            if (value := results.get(name)) is None:
                continue
            sample = {"loss": None, "dW": self.entries}.get(name, self.tokens)
            value = (value if sample is None else value[sample]).detach().to(reference)
            scale = self.values["magnitude"] if name == "loss" else reference.norm()
            error = (value - reference).norm() / scale.clamp_min(1e-300)
            found[name] = float(error) if error.isfinite() else float("inf")
        return found


@torch.no_grad()
def truth(inputs: Inputs, task: Task, seed: int = 0) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    live = inputs.live.nonzero()[:, 0]
    sample = torch.randperm(len(live), generator=generator)[:ROWS].sort().values.to(live.device)
    whole = len(live) <= MAX_TOKENS
    used = live if whole else live[sample]  # the tokens whose statistics are computed
    at = sample if whole else torch.arange(len(used), device=live.device)  # the sample among them
    weight = inputs.weight.double()
    stats = statistics(inputs.input[used], weight, inputs.target[used])
    values = {"logprobs": stats.logprobs[at], "entropy": stats.entropy[at]}
    target = inputs.target[used]
    random_entries = torch.randperm(len(weight), generator=generator)[:ROWS].to(live.device)
    entries = torch.cat([random_entries, target[at]]).unique()  # targets' entries have the large gradients
    if task.objective is not None:
        tokens = sk.Tokens(target, **{name: column[used].double() if column.is_floating_point() else column[used]
                                      for name, column in inputs.columns.items()})  # fmt: skip
        share = torch.full_like(stats.logprobs, 1 / len(live))
        loss, coefs = coefficients(task.objective, stats, tokens, share)
        values["dx"] = logit_gradient(inputs, used[at], weight, None, stats, at, coefs) @ weight
        if whole:
            values |= {"loss": (loss * share).sum(), "magnitude": (loss * share).abs().sum()}
            everyone = torch.arange(len(used), device=live.device)
            if not task.frozen:
                dz = logit_gradient(inputs, used, weight, entries, stats, everyone, coefs)
                values["dW"] = dz.t() @ inputs.input[used].double()
    return Truth(live[sample], entries, values)


def statistics(x: Tensor, weight: Tensor, target: Tensor) -> sk.TokenStats:
    """ℓ, H, lse (n,) in fp64, in chunks of half a gigabyte."""
    chunk = max(1, 2**26 // len(weight))
    parts = [
        sk.reference.token_stats(x[i : i + chunk].double() @ weight.t(), target[i : i + chunk]).fields()[:3]
        for i in range(0, len(x), chunk)
    ]
    return sk.TokenStats(*(torch.cat(fields) for fields in zip(*parts)))


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
