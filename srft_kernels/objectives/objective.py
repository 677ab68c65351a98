"""An objective: what it is given of each token, what it may be asked, and the terms that every built-in one has.

It is a callable `(stats: TokenStats, tokens: Tokens) -> Tensor`, one loss per token, written in plain PyTorch; the
engine differentiates it on n-long vectors (`differentiate`) and never shows it a logit. What else the engine and a
trainer ask of an objective is written down in `Objective`, with every default.

The built-in ones are frozen dataclasses, a file each: cross_entropy.py, policy_gradient.py, srft.py; everything else in
the family is a choice of their options (presets.py, docs/objectives.md). Symbols: p = e^ℓ; r = e^{ℓ − ℓ_old};
A advantage; sg = stop-gradient.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, words
from ..extras import TokenExtras
from ..head import rows_of
from ..trees import node
from .ratios import LOG_RATIO_LIMIT, Correction, log_ratio, silenced, slope

SCOPES = ("token", "sequence", "batch")
# What built-in objectives read, each a keyword argument shaped like target.
ANNOTATIONS = (
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "sampler_logprobs",
    "demo_logprobs",
    "is_demo",
    "rewards",
    "sequence_ids",
    "weight_entropy",
)


# ---- what an objective is given


@node
@dataclass(frozen=True)
class TokenStats:
    """Statistics of n tokens under the policy, in nats; all shaped alike, fp32 (fp64 for fp64 inputs).

    logprobs   ℓ = z_y − logsumexp(z), the log-probability of the target
    entropy    H = −Σ_v p_v log p_v
    logsumexp  log Σ_v e^{z_v}
    smooth     Σ_v ω_v log p_v for class weights ω; present only when an objective smooths its labels
    extras     what else `linear_logprobs(extras=...)` was asked for; an objective sees None
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    smooth: Tensor | None = None
    extras: TokenExtras | None = None

    def fields(self) -> tuple[Tensor, ...]:
        present = (self.logprobs, self.entropy, self.logsumexp)
        return present if self.smooth is None else (*present, self.smooth)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        return TokenStats(*(function(field) for field in self.fields()))

    def where(self, live: Tensor | None) -> TokenStats:  # (n,)
        """0 where not live; None: all are."""
        return self if live is None else self.map(lambda field: torch.where(live, field, 0))

    @classmethod
    def cat(cls, parts: list[TokenStats]) -> TokenStats:
        return cls(*map(cat, zip(*(part.fields() for part in parts))))


def cat(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a column (n,) in memory of its own; they are often one, which then is as it is."""
    return parts[0] if len(parts) == 1 and not parts[0]._is_view() else torch.cat(parts)


class Tokens:
    """Annotations of n tokens by name: `tokens.target`, `tokens.advantages`, or whatever the caller passed.

    Reading one that was not given raises a ValueError that names it; `tokens.get(name)` returns None instead.
    `live` and `counted` tell which tokens take part, where not all do: see the table in batch.py.
    """

    def __init__(self, target: Tensor, **annotations: Tensor | None):  # (n,) each
        self._columns = {"target": target, **{k: v for k, v in annotations.items() if v is not None}}

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):  # copy and pickle probe for these
            raise AttributeError(name)
        column = self._columns.get(name)
        if column is None:
            given = ", ".join(sorted(self._columns))
            raise ValueError(
                f"the objective reads the annotation `{name}`, which was not given (given: {given}); "
                f"pass {name}=..., a tensor shaped like target"
            )
        return column

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """The same annotations for some of the tokens."""
        some = rows_of if isinstance(rows, slice) else Tensor.__getitem__
        return self.map(lambda column: some(column, rows))

    rows = __getitem__

    def __iter__(self) -> Iterator[str]:
        """Their names, not the tokens: what `scope` and `requires` are asked about."""
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def get(self, name: str) -> Tensor | None:
        return self._columns.get(name)

    def columns(self) -> Iterable[tuple[str, Tensor]]:
        return self._columns.items()

    def averaged(self) -> Tensor | None:
        """Over which of them averages are; None: all."""
        counted = self.get("counted")
        return self.get("live") if counted is None else counted

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(**{name: function(column) for name, column in self._columns.items()})

    def replace(self, **columns: Tensor) -> Tokens:
        return Tokens(**{**self._columns, **columns})


# ---- what an objective may be asked


class Objective:
    """What an objective is asked, with the answer of one that says nothing. `names`: of the annotations passed.

    twin         where its device code is, "module:function" (see rows/triton_objectives.py); None: it has none. It
                 belongs to the class that names it and not to its subclasses, whose formula may be another
    reads        annotations that it may read, by name; None: only it knows
    reads_live   True where a loss of several tokens averages over `tokens.averaged()` alone, and so do `metrics`; else
                 tokens that are not live are taken out first, for which the host waits for an accelerator
    crosses      False where no token's loss has a gradient to another token's statistics, which it reads as constants;
                 True where one may have, and then so may a token of weight 0; None: where losses depend on other tokens
    has_metrics  whether `metrics` tells anything
    learns_from  which tokens it has a loss for: "demonstrations", "rollouts"
    switches     True where a prompt teaches by its rollouts or by its demonstration, never by both: whoever makes the
                 batch has to choose (`hpt_switch`)
    label_smoothing  not 0 where it reads `stats.smooth`
    steep        whether the slope of a token's loss may be far above that of others: fp16 gradients then need room
    """

    twin: ClassVar[str | None] = None
    reads: ClassVar[tuple[str, ...] | None] = None
    reads_live = False
    crosses: bool | None = None
    has_metrics = False
    learns_from: tuple[str, ...] = ("demonstrations", "rollouts")
    switches = False
    label_smoothing = 0.0
    steep = False

    def __init_subclass__(cls, twin: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if hasattr(cls, "token_local"):
            raise TypeError(f"{cls.__name__}.token_local: an Objective says over which tokens by `scope(names)`")
        cls.twin = twin
        if twin is not None:
            BUILT_IN[cls.__name__] = cls

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """Losses (n,)."""
        raise NotImplementedError

    def scope(self, names: Collection[str]) -> str:
        """Which tokens a token's loss depends on: itself, a "token"; those of its "sequence"; or the "batch"."""
        return "token"

    def requires(self, names: Collection[str]) -> tuple[str, ...]:
        """Annotations that it cannot do without."""
        return ()

    def needs_of_step(self, names: Collection[str]) -> tuple[str, ...]:
        """Annotations that only all tokens of an optimisation step together can tell."""
        return ()

    def inactive(self, tokens: Tokens) -> Tensor | None:
        """(n,) True where a token surely has no gradient: its row is left out of the two backward products."""
        return None

    def weight_entropy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """(n,) the entropy that weighs each token: its own, or a mean over its scope."""
        return stats.entropy.detach()

    def entropy_weights(self, stats: TokenStats, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(n,) e^{∓H} that a demonstration's and a rollout's loss is, or would be, weighed by."""
        entropy = self.weight_entropy(stats, tokens)
        return torch.exp(-entropy), torch.exp(entropy)

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        """Token means for logging, each a 0-d tensor."""
        return {}


BUILT_IN: dict[str, type[Objective]] = {}  # by name: those with a twin, which compiled calls hold as constants


def check_annotations(objective: Objective, names: Collection[str], options: Collection[str]) -> None:
    """Raise for names that cannot be an annotation's, slips of known ones or of a call's options, and missing ones."""
    for name in names:
        if name in ("live", "counted"):
            raise ValueError(f"an annotation cannot be called {name}, which tells the tokens that take part: rename it")
        if hasattr(Tokens, name):
            raise ValueError(f"an annotation cannot be called {name}, which is a method of Tokens: rename it")
        if objective.reads is None or name in objective.reads:  # most are optional: a slip would change the loss
            continue
        if near := difflib.get_close_matches(name, (*objective.reads, *options), n=1, cutoff=0.85):
            raise TypeError(f"unknown annotation {name}: did you mean {near[0]}?")
        if objective.twin is not None:
            owner, known = type(objective).__name__, ", ".join(objective.reads)
            own = [field.name for field in fields(objective)]
            if name in own:
                raise TypeError(f"unknown annotation {name}: it is an option of the objective, {owner}({name}=...)")
            advice = words.meant(name, (*objective.reads, *options)) or words.meant(name, own)
            raise TypeError(f"unknown annotation {name}{advice or f': {owner} reads none but {known}'}")
    missing = [name for name in objective.requires(names) if name not in names]
    if missing:
        raise ValueError(
            f"{objective} needs the annotation{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"pass {'=, '.join(missing)}=... shaped like target"
        )


def annotation(name: str, column: Tensor, dtype: torch.dtype) -> Tensor:  # (...)
    """An annotation as objectives see it: numbers in the statistics' type, since −A of a byte is 255. What is_demo and
    ids say no rounding may change, and integers by a name of the caller's own may be ids."""
    if name == "is_demo":
        return column if column.dtype == torch.bool else column != 0
    numbers = column.is_floating_point() or (name in ANNOTATIONS and name not in checks.IDS)
    return column.to(dtype) if numbers else column


def couples(objective: Objective, names: Collection[str]) -> bool:
    """Whether a token's loss may have a gradient to another token's statistics."""
    return objective.scope(names) != "token" if objective.crosses is None else bool(objective.crosses)


def token_losses(objective: Objective, stats: TokenStats, tokens: Tokens) -> Tensor:
    """objective(stats, tokens), checked: a caller's own may return anything."""
    loss = objective(stats, tokens)
    expected = tuple(stats.logprobs.shape)
    if not isinstance(loss, Tensor) or tuple(loss.shape) != expected:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the objective returned {found}, expected one loss per token: a tensor of shape {expected}")
    return loss


def weighted(loss: Tensor, weight: Tensor) -> Tensor:  # (n,), (n,)
    """weight · loss, where a weight of 0 silences even an infinite loss."""
    return torch.where(weight == 0, 0, loss * weight)


def differentiate(
    objective: Objective, stats: TokenStats, tokens: Tokens, weight: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # (n,)
    """(losses (n,), derivatives (n,) of Σ weight·loss to each statistic), by autograd on n-long vectors.

    This is all that a backward pass needs to know of an objective (g, h, k of the derivation; the last one, of
    `smooth`, only with label smoothing). None stands for a statistic that the objective does not depend on.
    """
    with torch.enable_grad():
        leaves = stats.map(lambda field: field.detach().requires_grad_())
        loss = token_losses(objective, leaves, tokens)
        if not loss.requires_grad:  # e.g. a part that is switched off
            return loss, (None,) * len(leaves.fields())
        grads = torch.autograd.grad(loss, leaves.fields(), grad_outputs=weight.to(loss.dtype), allow_unused=True)
    if not couples(objective, tokens):
        silent = weight == 0  # whatever its derivative is, infinite or not
        grads = tuple(None if g is None else torch.where(silent, 0, g) for g in grads)
    return loss.detach(), grads


# ---- what every built-in objective has


@dataclass(frozen=True, kw_only=True)
class Terms(Objective):
    """Terms that any objective can have; a family adds `_policy`, its own loss of each token, and overrides the four
    methods after it where it has more to say.

        correction · policy  +  kl_coef · KL  −  entropy_coef · H

    entropy_coef     c: −c·H on every token, differentiated through H
    kl_coef          β of an estimate of KL(policy ‖ reference) on sampled tokens; annotation `ref_logprobs`, q:
    kl_estimator     "k1" ℓ − q;  "k2" (ℓ − q)²/2;  "k3" e^{q−ℓ} − (q − ℓ) − 1 (joschu.net/blog/kl-approx.html; GRPO's
                     k3). Differentiated as it stands: k2's gradient is that of the KL in expectation, k1's is 0
    correction       weights for rollouts that another program sampled; annotation `sampler_logprobs`
    max_probability  tokens with p above it have no policy term: what is likely enough is left alone
    """

    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    correction: Correction | None = None
    max_probability: float | None = None

    reads = ANNOTATIONS
    reads_live = True
    crosses = False
    has_metrics = True

    def __post_init__(self):
        checks.finite(self)
        checks.one_of(self, kl_estimator=("k1", "k2", "k3"))
        if not (self.correction is None or isinstance(self.correction, Correction)):
            raise TypeError(
                f"{type(self).__name__}(correction={self.correction!r}): expected None or a Correction, such as "
                "Correction('truncate', high=2.0)"
            )
        checks.above_zero(self, "max_probability")
        checks.within(self, kl_coef=(0, None), max_probability=(0, 1))

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def steep(self) -> bool:
        return bool(self.kl_coef)  # e^{q − ℓ}

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def _own_metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        return {}

    def _scopes(self, names: Collection[str]) -> set[str]:
        """The scopes of the parts of the loss."""
        return {"sequence" if self.correction is not None and self.correction.level != "token" else "token"}

    def _demonstrated(self, tokens: Tokens) -> Tensor | None:
        """Tokens that no policy sampled, where there are such: they have no KL estimate and no correction."""
        return None

    def _meaningful(self, tokens: Tokens) -> Tokens:
        """Annotations without what means nothing where it stands."""
        return tokens

    def scope(self, names: Collection[str]) -> str:
        return max(self._scopes(names), key=SCOPES.index)

    def requires(self, names: Collection[str]) -> tuple[str, ...]:
        return (
            *(("ref_logprobs",) if self.kl_coef else ()),
            *(("sampler_logprobs",) if self.correction is not None else ()),
            *(("sequence_ids",) if "sequence" in self._scopes(names) else ()),
        )

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        tokens = self._meaningful(tokens)
        loss = self._policy(stats, tokens)
        if self.max_probability is not None:
            loss = torch.where(stats.logprobs.detach().exp() > self.max_probability, 0, loss)
        if self.correction is not None:
            loss = silenced(self.correction.bounded(self._mismatch(stats, tokens)), loss)
        if self.kl_coef:
            loss = loss + self.kl_coef * self._kl(stats, tokens)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * stats.entropy
        return loss

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        tokens = self._meaningful(tokens)
        result = self._own_metrics(stats, tokens)
        demonstrated = self._demonstrated(tokens)
        sampled = torch.ones_like(stats.logprobs, dtype=torch.bool) if demonstrated is None else ~demonstrated
        if self.kl_coef:
            result["ref_kl"] = mean(tokens, self._kl(stats, tokens), sampled)
        if self.correction is not None:
            mismatch = self._mismatch(stats, tokens)
            result["correction_weight"] = mean(tokens, self.correction.bounded(mismatch), sampled)
            outside = self.correction.beyond(mismatch)
            for name, where in (("correction_outside", outside), ("correction_nan", mismatch.isnan())):
                result[name] = mean(tokens, where.to(mismatch.dtype), sampled)
        return result

    def _sampled(self, tokens: Tokens) -> Tensor | None:
        """Tokens that the policy sampled, over which sequences are averaged; None: all."""
        averaged, demonstrated = tokens.averaged(), self._demonstrated(tokens)
        if demonstrated is None:
            return averaged
        return ~demonstrated if averaged is None else averaged & ~demonstrated

    def _mismatch(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """ρ of the correction; 1 on demonstrations, which have no sampler."""
        old = None if self.correction.current else tokens.get("old_logprobs")
        logprobs = stats.logprobs if old is None else old
        ids = None if self.correction.level == "token" else tokens.sequence_ids
        ratio = self.correction.ratio(logprobs, tokens.sampler_logprobs, ids, self._sampled(tokens))
        demonstrated = self._demonstrated(tokens)
        return ratio if demonstrated is None else torch.where(demonstrated, 1, ratio)

    def _kl(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        gap = log_ratio(tokens.ref_logprobs, stats.logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        gap = gap - slope(stats.logprobs)
        estimate = {"k1": lambda: -gap, "k2": lambda: gap.square() / 2, "k3": lambda: torch.expm1(gap) - gap}
        kl, demonstrated = estimate[self.kl_estimator](), self._demonstrated(tokens)
        return kl if demonstrated is None else torch.where(demonstrated, 0, kl)


def mean(tokens: Tokens, values: Tensor, where: Tensor | None = None) -> Tensor:  # (n,), (n,)
    """Mean over the tokens that count where `where` holds; 0 when there is none."""
    if (averaged := tokens.averaged()) is not None:
        where = averaged if where is None else where & averaged
    if where is None:
        return values.mean()
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)
