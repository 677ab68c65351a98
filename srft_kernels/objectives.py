"""What a token minimises: a formula from (ℓ, H, lse) and the token's annotations to its loss.

An objective is any callable `(stats: TokenStats, tokens: Tokens) -> Tensor`, one loss per token, written in plain
PyTorch; the engine differentiates it on n-long vectors and needs to know nothing else. It may also have

    token_local   False (or a method of the annotations) when a token's loss depends on other tokens: the engine then
                  shows it all tokens at once, in two passes. Default True: it sees a slice of the tokens at a time.
    scope         method of the annotations, finer than token_local: "token", "sequence" (a token's loss depends on the
                  tokens that share its `sequence_ids`) or "batch"
    crosses       False where no token's loss has a gradient to another token's statistics, which it reads as constants.
                  Default: what is not token-local crosses; then a token of weight 0 may have a gradient
    reads_live    True where an objective that is not token-local averages over `tokens.averaged()` alone, and so does
                  `metrics`; else tokens that are not live are taken out first, for which the host waits for an
                  accelerator
    requires      method of the given annotations: names it cannot do without, checked before any work
    inactive      method of the annotations: True where a token surely has no gradient, so that its row can be left
                  out of the two backward matrix products
    metrics       method: token means for logging

The built-in objectives are frozen dataclasses: two are here, the one with demonstrations is in srft.py; everything else
in the family is a choice of their options (presets.py, docs/objectives.md). Symbols: p = e^ℓ; r = e^{ℓ − ℓ_old};
A advantage; sg = stop-gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from .correction import LOG_RATIO_LIMIT, Correction, log_ratio, numbers, one_of, over_sequences, positive, within
from .shaping import check_shape, shape
from .tokens import Tokens, TokenStats

SCOPES = ("token", "sequence", "batch")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Terms that any objective can have; a family adds `_policy`, its own loss of each token.

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

    crosses = False
    reads_live = True

    def __post_init__(self):
        numbers(self)
        one_of(self, kl_estimator=("k1", "k2", "k3"))
        if not (self.correction is None or isinstance(self.correction, Correction)):
            raise TypeError(
                f"{type(self).__name__}(correction={self.correction!r}): expected None or a Correction, such as "
                "Correction('truncate', high=2.0)"
            )
        positive(self, "max_probability")
        within(self, kl_coef=(0, None), max_probability=(0, 1))

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def _demonstrated(self, tokens: Tokens) -> Tensor | None:
        """Tokens that no policy sampled, where there are such: they have no KL estimate and no correction."""
        return None

    def _sampled(self, tokens: Tokens) -> Tensor | None:
        """The others, over which sequences are averaged; None: all."""
        averaged, demonstrated = tokens.averaged(), self._demonstrated(tokens)
        if demonstrated is None:
            return averaged
        return ~demonstrated if averaged is None else averaged & ~demonstrated

    def _scopes(self, given: Collection[str]) -> set[str]:
        """The scopes of the parts of the loss."""
        return {"sequence" if self.correction is not None and self.correction.level != "token" else "token"}

    def scope(self, given: Collection[str]) -> str:
        return max(self._scopes(given), key=SCOPES.index)

    def token_local(self, given: Collection[str]) -> bool:
        return self.scope(given) == "token"

    def requires(self, given: Collection[str]) -> tuple[str, ...]:
        return (
            *(("ref_logprobs",) if self.kl_coef else ()),
            *(("sampler_logprobs",) if self.correction is not None else ()),
            *(("sequence_ids",) if "sequence" in self._scopes(given) else ()),
        )

    def inactive(self, tokens: Tokens) -> Tensor | None:
        return None

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        loss = self._policy(stats, tokens)
        if self.max_probability is not None:
            loss = torch.where(stats.logprobs.detach().exp() > self.max_probability, 0, loss)
        if self.correction is not None:
            loss = _times(self.correction.bounded(self._mismatch(stats, tokens)), loss)
        if self.kl_coef:
            loss = loss + self.kl_coef * self._kl(stats, tokens)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * stats.entropy
        return loss

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        demonstrated = self._demonstrated(tokens)
        sampled = torch.ones_like(stats.logprobs, dtype=torch.bool) if demonstrated is None else ~demonstrated
        result = {}
        if self.kl_coef:
            result["ref_kl"] = _mean(tokens, self._kl(stats, tokens), sampled)
        if self.correction is not None:
            mismatch = self._mismatch(stats, tokens)
            result["correction_weight"] = _mean(tokens, self.correction.bounded(mismatch), sampled)
            outside = (~self.correction.inside(mismatch)).to(mismatch.dtype)
            result["correction_outside"] = _mean(tokens, outside, sampled)
        return result

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
        gap = gap - _slope(stats.logprobs)
        estimate = {"k1": lambda: -gap, "k2": lambda: gap.square() / 2, "k3": lambda: torch.expm1(gap) - gap}
        kl, demonstrated = estimate[self.kl_estimator](), self._demonstrated(tokens)
        return kl if demonstrated is None else torch.where(demonstrated, 0, kl)


@dataclass(frozen=True, repr=False)
class CrossEntropy(Objective):
    """−ℓ, optionally label-smoothed, with a z-loss, or weighted by the token's own probability.

    label_smoothing       ε: (1 − ε)(−ℓ) − ε Σ_v ω_v log p_v, with ω_v = 1/V (or class weights over V)
    z_loss                c: + c·lse² (PaLM, arXiv 2204.02311)
    probability_weighted  −sg(p)·ℓ (DFT, arXiv 2508.05629)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    probability_weighted: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], found {self.label_smoothing}")

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        loss = -stats.logprobs
        if self.probability_weighted:
            loss = _times(stats.logprobs.detach().exp(), loss)
        if (class_weight := tokens.get("class_weight")) is not None:  # of the target's class
            loss = _times(class_weight, loss)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * stats.smooth
        if self.z_loss:
            loss = loss + self.z_loss * stats.logsumexp.square()
        return loss


@dataclass(frozen=True, repr=False)
class PolicyGradient(Objective):
    """Policy gradients on sampled tokens; annotations `advantages`, and `old_logprobs` if the rollouts are not fresh.

    surrogate     "reinforce" −A·ℓ;  "ppo" −min(r·A, clip(r)·A);  "cispo" −sg(clip(r))·A·ℓ (arXiv 2506.13585);
                  "sapo" −A·σ(τ(r − 1))·4/τ, a soft clip (arXiv 2511.20347)
    clip_low/high ε of clip(r, 1 − low, 1 + high); None: not clipped on that side (both None: plain r)
    dual_clip     c > 1: where A < 0 the PPO loss is at most −c·A (arXiv 1912.09729)
    tau_positive/negative  τ of SAPO where A > 0, and elsewhere
    ratio_shaping None: r itself; a number c > 0: `ratio_shape` of it, for "ppo" of tokens, whose clip then bounds that:
    ratio_shape   "p/(p+c)" f(p)/f(p_old) with f(p) = p/(p + c);  "p^c" r^c;  "c*log p" c·log r;  "p+c*log p"
                  r + c·log r (on_policy_reshape of LUFFY's code)
    ratio_level   "token", or "sequence": r = e^{mean over the sequence of ℓ − ℓ_old}, whose gradient reaches each
                  token through its own ℓ (GSPO-token, arXiv 2507.18071); needs `sequence_ids`

    ℓ − ℓ_old counts as 20 where it is more: r = 4.9e8.
    """

    surrogate: str = "ppo"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio_shape: str = "p/(p+c)"
    ratio_shaping: float | None = None
    ratio_level: str = "token"
    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        one_of(self, surrogate=("reinforce", "ppo", "cispo", "sapo"), ratio_level=("token", "sequence"))
        check_shape(self, "ratio")
        if self.ratio_shaping is not None and (self.surrogate, self.ratio_level) != ("ppo", "token"):
            raise ValueError(
                f"{name}(ratio_shaping={self.ratio_shaping}) reshapes the ratio of surrogate='ppo' and "
                f"ratio_level='token', found {self.surrogate!r} and {self.ratio_level!r}"
            )
        within(self, clip_low=(0, 1), clip_high=(0, None))
        if self.ratio_shaping is not None and self.ratio_shape == "c*log p" and self._clips:
            raise ValueError(
                f"{name}(ratio_shape='c*log p', clip_low={self.clip_low}, clip_high={self.clip_high}): a clip is about "
                "1, but where nothing has changed c·log r is 0: pass clip_low=None, clip_high=None"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, found {self.dual_clip}")
        if self.dual_clip is not None and self.surrogate != "ppo":
            raise ValueError(f"{name}(dual_clip={self.dual_clip}) bounds surrogate='ppo', found {self.surrogate!r}")
        positive(self, "tau_positive", "tau_negative")

    @property
    def _clips(self) -> bool:
        return (self.clip_low, self.clip_high) != (None, None)

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """(low, high) with infinities for sides that are not clipped."""
        return tuple(float("inf") if side is None else side for side in (self.clip_low, self.clip_high))

    @property
    def _sequence_ratio(self) -> bool:
        return self.ratio_level == "sequence" and self.surrogate != "reinforce"

    def _scopes(self, given: Collection[str]) -> set[str]:
        sequence = self._sequence_ratio and "old_logprobs" in given  # r = 1 on fresh data, at any level
        return super()._scopes(given) | ({"sequence"} if sequence else set())

    def requires(self, given: Collection[str]) -> tuple[str, ...]:
        return ("advantages", *super().requires(given))

    def inactive(self, tokens: Tokens) -> Tensor | None:
        return None if self.kl_coef or self.entropy_coef else tokens.advantages == 0

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        return self._surrogate(stats, tokens, tokens.advantages)

    def _surrogate(self, stats: TokenStats, tokens: Tokens, signal: Tensor) -> Tensor:
        """The loss of sampled tokens that should become likelier (signal > 0) or rarer (< 0): A, as a rule."""
        if self.surrogate == "reinforce":
            return _times(-signal, stats.logprobs)
        ratio, (low, high) = self._ratio(stats, tokens), self.clip_bounds
        if self.surrogate == "cispo":
            return _times(-signal * ratio.detach().clamp(1 - low, 1 + high), stats.logprobs)
        if self.surrogate == "sapo":
            tau = torch.where(signal > 0, torch.full_like(ratio, self.tau_positive), self.tau_negative)
            return -signal * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        loss = _times(-signal, ratio)
        if self._clips:
            loss = torch.maximum(loss, _times(-signal, ratio.clamp(1 - low, 1 + high)))
        if self.dual_clip is None:
            return loss
        return torch.where(signal < 0, torch.minimum(loss, -signal * self.dual_clip), loss)

    def _log_ratio(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """ℓ − ℓ_old or its mean over the sequence's sampled tokens, without gradient; 0 on fresh data."""
        if (old := tokens.get("old_logprobs")) is None:
            return torch.zeros_like(stats.logprobs)
        change = log_ratio(stats.logprobs.detach(), old)
        if self._sequence_ratio:
            change = over_sequences(change, tokens.sequence_ids, self._sampled(tokens))
        return change.clamp(max=LOG_RATIO_LIMIT)

    def _ratio(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """r or its shape, with its gradient."""
        log_r, c = self._log_ratio(stats, tokens) + _slope(stats.logprobs), self.ratio_shaping
        if c is None or self.ratio_shape != "p/(p+c)":
            return shape(log_r, self.ratio_shape, c)
        old = tokens.get("old_logprobs")
        old = stats.logprobs.detach() if old is None else old
        return log_r.exp() * (old.exp() + c) / (stats.logprobs.exp() + c)

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        result = {"entropy": _mean(tokens, stats.entropy)}
        if self.surrogate != "reinforce":
            result |= self._drift(stats, tokens, tokens.advantages)
        return result | super().metrics(stats, tokens)

    def _drift(self, stats: TokenStats, tokens: Tokens, signal: Tensor) -> dict[str, Tensor]:
        """Distance to the policy that sampled: share of tokens beyond the clip, and KL(old ‖ new) ≈ r − 1 − log r."""
        change, (low, high) = self._log_ratio(stats, tokens), self.clip_bounds
        ratio, demonstrated = self._ratio(stats, tokens), self._demonstrated(tokens)
        if self.surrogate == "cispo":  # its clip stops a ratio on either side, whatever the advantage
            signal = torch.sign(ratio - 1)
        beyond = ((ratio > 1 + high) & (signal > 0)) | ((ratio < 1 - low) & (signal < 0))
        sampled = torch.ones_like(beyond) if demonstrated is None else ~demonstrated
        drift = torch.expm1(change) - change.clamp(min=-LOG_RATIO_LIMIT)
        clipped = {} if self.surrogate == "sapo" else {"clip_fraction": _mean(tokens, beyond.to(ratio.dtype), sampled)}
        return {**clipped, "approx_kl": _mean(tokens, drift, sampled)}


def _mean(tokens: Tokens, values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean over the tokens that count where `where` holds; 0 when there is none."""
    if (averaged := tokens.averaged()) is not None:
        where = averaged if where is None else where & averaged
    if where is None:
        return values.mean()
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """weight · values, and 0 where the weight is, though the value be infinite: log-probs can be −inf."""
    return torch.where(weight == 0, 0, weight * values)


def _slope(logprobs: Tensor) -> Tensor:
    """0 with the derivative of `logprobs`, also where they are −inf and ℓ − sg(ℓ) would be NaN."""
    return _Slope.apply(logprobs)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs: Tensor) -> Tensor:
        return torch.zeros_like(logprobs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
