"""What `linear_loss` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .extras import TokenExtras
from .objectives.objective import Objective, Tokens, TokenStats
from .trees import node


@node
@dataclass(frozen=True)
class LossOutput:
    """What `linear_loss` returns: a node of PyTorch's trees, and fit for pickle.

    loss       scalar, Σ_t token_weight_t · loss_t; differentiable
    logprobs   ℓ, shaped like target, detached; 0 where ignored
    entropy    H in nats, likewise
    logsumexp  log Σ_v e^{z_v}, likewise
    metrics    means over this call's live tokens of token weight ≠ 0 ("accuracy": over all that are live), detached 0-d
               tensors; computed when first read, or pickled, from the statistics and what was passed of each token:
               a RuntimeError where one of these has been written over in between. With no live token there are none;
               they are NaN where nothing looks at the data to know: on accelerators, and in a graph of torch.compile
    extras     what `extras` asked for beside, else None
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    extras: TokenExtras | None = None
    _metrics: Metrics | None = field(default=None, repr=False)

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {} if self._metrics is None else self._metrics.read()

    @classmethod
    def of(
        cls, loss: Tensor, stats: TokenStats, tokens: Tokens, objective: Objective, spread: Callable[[Tensor], Tensor],
        filtered: Tensor | None = None, extras: TokenExtras | None = None, argmax: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> LossOutput:  # (), (4,), (n,), (n,)  # fmt: skip
        """From the statistics of the n tokens that were worked through; `spread` gives a field target's shape, which
        extras have already."""
        stats = stats.map(lambda field: field.detach() if field.requires_grad else field)
        sources = (*stats.fields(), *tokens.columns(), *(() if weight is None else (weight,)))
        told = Metrics(lambda: metrics(objective, stats, tokens, filtered, argmax, weight), sources)
        return cls(loss, *map(spread, stats.fields()[:3]), extras, told)


class Metrics:
    """Metrics that are computed when they are first read, if their sources are then what they were."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]], sources: Iterable[Tensor] = ()):
        self.compute, self.values = compute, None
        # torch.inference_mode makes tensors that do not know how often they were changed
        self.sources = [(source, source._version) for source in sources if not source.is_inference()]

    def read(self) -> dict[str, Tensor]:
        if self.values is None:
            if any(source._version != version for source, version in self.sources):
                raise RuntimeError(
                    "the metrics of this output are made of its logprobs, entropy and logsumexp, and of the targets, "
                    "annotations and token weights that were passed, and one of these was changed in place before they "
                    "were read: read out.metrics first, or change a copy"
                )
            with torch.no_grad():
                self.values = self.compute()
            self.compute, self.sources = None, ()
        return self.values

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.read()}


def metrics(
    objective: Objective, stats: TokenStats, tokens: Tokens, filtered: Tensor | None, argmax: Tensor | None,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:  # (4,), (n,), (n,)  # fmt: skip
    """The objective's own over live tokens of `weight` (n,) ≠ 0, top-1 accuracy, and what a filtered backward drops."""
    live = tokens.get("live")
    if weight is not None and objective.reads_live:
        tokens = tokens.replace(counted=weight != 0)
    if live is not None and not objective.reads_live:  # where this waits for an accelerator
        stats, tokens = stats.map(lambda field: field[live]), tokens[live]
        argmax, live = argmax if argmax is None else argmax[live], None
    result = dict(objective.metrics(stats, tokens) or {}) if len(stats.logprobs) else {}
    if argmax is not None and len(argmax):
        right = (argmax == tokens.target).to(stats.logprobs.dtype)
        result["accuracy"] = right.mean() if live is None else (right * live).sum() / live.sum()
    if live is not None:
        result = {name: torch.where(live.any(), value, torch.nan) for name, value in result.items()}
    if filtered is not None:
        dropped, whole = filtered.view(2, 2).unbind(1)
        errors = (dropped / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()
        result["filtered_norm"], result["filtered_dx_error"] = errors  # of ∂L/∂a; of dx, on sampled tokens
    return result
