"""What `linear_loss` returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

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
    _metrics: Metrics | dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def metrics(self) -> dict[str, Tensor]:
        told = self._metrics
        return told.read() if isinstance(told, Metrics) else told or {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_metrics": self.metrics}


@dataclass
class Metrics:
    """What metrics are computed from, when they are first read, of the n tokens that were worked through.

    argmax    (n,), where "accuracy" is asked for
    filtered  (4,), see filter.py
    weight    (n,) token weights
    values    the metrics, once read; the rest is then forgotten
    """

    objective: Objective
    stats: TokenStats
    tokens: Tokens
    argmax: Tensor | None = None
    filtered: Tensor | None = None
    weight: Tensor | None = None
    values: dict[str, Tensor] | None = None
    changed: bool = False  # whether one of these was written over

    def __post_init__(self):
        self.versions: list[tuple[Tensor, int]] = []
        # a backward adds to `filtered`; torch.inference_mode's tensors do not know how often they were changed
        sources = [source for name, source in self.named().items() if name != "filtered"]
        if any(source.is_inference() for source in sources):
            self.read()
        else:
            self.versions = [(source, source._version) for source in sources]

    def named(self) -> dict[str, Tensor]:
        """Every tensor by its name, those of `tokens` after a dot."""
        own = {**vars(self.stats), **{name: getattr(self, name) for name in ("argmax", "filtered", "weight")}}
        own |= {f"tokens.{name}": column for name, column in self.tokens.columns()}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def stale(self) -> bool:
        return self.changed or any(source._version != version for source, version in self.versions)

    def read(self) -> dict[str, Tensor]:
        if self.values is None:
            if self.stale():
                raise RuntimeError(
                    "the metrics of this output are made of its logprobs, entropy and logsumexp, and of the targets, "
                    "annotations and token weights that were passed, and one of these was changed in place before they "
                    "were read: read out.metrics first, or change a copy"
                )
            with torch.no_grad():
                self.values = metrics(self.objective, self.stats, self.tokens, self.filtered, self.argmax, self.weight)
            nothing = self.stats.logprobs[:0]
            self.stats, self.tokens = TokenStats(nothing, nothing, nothing), Tokens(nothing)
            self.argmax = self.filtered = self.weight = None
        return self.values


def _flattened(told: Metrics) -> tuple[list[Any], Any]:
    if told.values is not None:
        return [told.values], None
    named = told.named()
    return list(named.values()), (tuple(named), told.objective, told.stale())


def _unflattened(values: Iterable[Any], context: Any) -> Metrics | dict[str, Tensor]:
    if context is None:
        return next(iter(values))
    names, objective, stale = context
    named = dict(zip(names, values))
    if not all(isinstance(value, Tensor) for value in named.values()):  # a tree of something else than tensors
        return {}
    tokens = {name.removeprefix("tokens."): value for name, value in named.items() if name.startswith("tokens.")}
    kinds = {"live": torch.bool, "counted": torch.bool, "target": torch.int64}  # whatever the map made of them
    tokens |= {name: tokens[name].to(kind) for name, kind in kinds.items() if name in tokens}
    stats = {name: named[name] for name in TokenStats.__dataclass_fields__ if name in named}
    others = {name: named[name] for name in ("argmax", "filtered", "weight") if name in named}
    return Metrics(objective, TokenStats(**stats), Tokens(**tokens), **others, changed=stale)


def _flattened_with_keys(told: Metrics) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flattened(told)
    names = ["values"] if context is None else context[0]
    return [(_pytree.GetAttrKey(name), value) for name, value in zip(names, values)], context


_pytree.register_pytree_node(Metrics, _flattened, _unflattened, flatten_with_keys_fn=_flattened_with_keys)


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
