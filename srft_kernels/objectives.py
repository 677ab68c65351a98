"""What a token minimises: a formula from (ℓ, H, lse) and the token's annotations to its loss.

An objective is any callable `(stats: TokenStats, tokens: Tokens) -> Tensor`, one loss per token, written in plain
PyTorch; the engine differentiates it on n-long vectors and needs to know nothing else. It may also have

    token_local   False (or a method of the annotations) when a token's loss depends on other tokens: the engine then
                  shows it all tokens at once, in two passes. Default True: it sees a slice of the tokens at a time.
    requires      method of the given annotations: names it cannot do without, checked before any work
    inactive      method of the annotations: True where a token surely has no gradient, so that its row can be left
                  out of the two backward matrix products
    metrics       method: token means for logging

The three built-in objectives are frozen dataclasses; everything else in the family is a choice of their options
(presets.py). Symbols: p = e^ℓ; r = e^{ℓ − ℓ_old}; A advantage; sg = stop-gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .tokens import Tokens, TokenStats


def _one_of(owner: object, **choices: tuple[str, ...]) -> None:
    for field, allowed in choices.items():
        value = getattr(owner, field)
        if value not in allowed:
            raise ValueError(
                f"{type(owner).__name__}({field}={value!r}): expected one of {', '.join(map(repr, allowed))}"
            )


def _clip_range(owner: object, optional: bool = False) -> None:
    for field in ("clip_low", "clip_high"):
        value = getattr(owner, field)
        if not (isinstance(value, Real) and value >= 0) and not (optional and value is None):
            expected = "a number ≥ 0" + optional * " or None"
            raise ValueError(f"{type(owner).__name__}({field}={value!r}): expected {expected}")


def _ratio(stats: TokenStats, tokens: Tokens, fresh: Tensor | None = None) -> Tensor:
    """r = e^{ℓ − ℓ_old}. Without old log-probs, and where `fresh`, it is on-policy: r = 1 with the gradient of ℓ."""
    current, old = stats.logprobs.detach(), tokens.get("old_logprobs")
    if old is None:
        old = current
    elif fresh is not None:
        old = torch.where(fresh, current, old)
    return torch.exp(stats.logprobs - old)


def _clipped(ratio: Tensor, signal: Tensor, low: float, high: float) -> Tensor:
    """PPO's pessimistic loss, −min(r·A, clip(r, 1 − low, 1 + high)·A)."""
    return torch.maximum(-ratio * signal, -ratio.clamp(1 - low, 1 + high) * signal)


def _sequence_average(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean of `values` over the tokens that share an id, given back to each of them."""
    distinct, inverse = sequence_ids.unique(return_inverse=True)
    total = values.new_zeros(len(distinct)).index_add(0, inverse, values)
    count = values.new_zeros(len(distinct)).index_add(0, inverse, torch.ones_like(values))
    return (total / count)[inverse]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the tokens where `where` holds; 0 when there is none."""
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


@dataclass(frozen=True)
class CrossEntropy:
    """−ℓ, optionally label-smoothed, with a z-loss, or weighted by the token's own probability.

    label_smoothing       ε: (1 − ε)(−ℓ) − ε Σ_v ω_v log p_v, with ω_v = 1/V (or class weights over V)
    z_loss                c: + c·lse² (PaLM, arXiv 2204.02311)
    probability_weighted  −sg(p)·ℓ (DFT, arXiv 2508.05629)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    probability_weighted: bool = False

    def __post_init__(self):
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], found {self.label_smoothing}")

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        loss = -stats.logprobs
        if self.probability_weighted:
            loss = loss * stats.logprobs.detach().exp()
        if (class_weight := tokens.get("class_weight")) is not None:  # of the target's class
            loss = loss * class_weight
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * stats.smooth
        if self.z_loss:
            loss = loss + self.z_loss * stats.logsumexp.square()
        return loss


@dataclass(frozen=True)
class PolicyGradient:
    """Policy gradients on sampled tokens; annotations `advantages`, and as needed `old_logprobs`, `ref_logprobs`.

    surrogate     "reinforce" −A·ℓ;  "ppo" −min(r·A, clip(r)·A);  "cispo" −sg(clip(r))·A·ℓ (arXiv 2506.13585)
    clip_low/high ε of clip(r, 1 − low, 1 + high); None: not clipped on that side (both None: plain r)
    dual_clip     c > 1: where A < 0 the PPO loss is at most −c·A (arXiv 1912.09729)
    ratio_level   "token", or "sequence": r = e^{mean over the sequence of ℓ − ℓ_old}, whose gradient reaches each
                  token through its own ℓ (GSPO-token, arXiv 2507.18071); needs `sequence_ids`
    kl_coef       β·(e^{q−ℓ} − (q − ℓ) − 1), q = ref_logprobs (k3, as in GRPO, arXiv 2402.03300)
    entropy_coef  −c·H, differentiated through H
    """

    surrogate: str = "ppo"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio_level: str = "token"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self):
        _one_of(self, surrogate=("reinforce", "ppo", "cispo"), ratio_level=("token", "sequence"))
        _clip_range(self, optional=True)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, found {self.dual_clip}")

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """(low, high) with infinities for sides that are not clipped."""
        return tuple(float("inf") if side is None else side for side in (self.clip_low, self.clip_high))

    def token_local(self, given: Collection[str]) -> bool:
        return self.ratio_level == "token" or self.surrogate == "reinforce"

    def requires(self, given: Collection[str]) -> tuple[str, ...]:
        sequence = () if self.token_local(given) else ("sequence_ids",)
        return ("advantages", *(("ref_logprobs",) if self.kl_coef else ()), *sequence)

    def inactive(self, tokens: Tokens) -> Tensor | None:
        return None if self.kl_coef or self.entropy_coef else tokens.advantages == 0

    def _ratio(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        if self.token_local(()):
            return _ratio(stats, tokens)
        logprobs = stats.logprobs
        old = tokens.get("old_logprobs")
        change = logprobs.detach() - (logprobs.detach() if old is None else old)
        mean = _sequence_average(change, tokens.sequence_ids)
        return torch.exp(mean + (logprobs - logprobs.detach()))

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        advantages = tokens.advantages
        if self.surrogate == "reinforce":
            loss = -advantages * stats.logprobs
        else:
            ratio = self._ratio(stats, tokens)
            low, high = self.clip_bounds
            if self.surrogate == "cispo":
                loss = -ratio.detach().clamp(1 - low, 1 + high) * advantages * stats.logprobs
            else:
                loss = _clipped(ratio, advantages, low, high)
            if self.dual_clip is not None and self.surrogate == "ppo":
                loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual_clip), loss)
        if self.kl_coef:
            gap = tokens.ref_logprobs - stats.logprobs
            loss = loss + self.kl_coef * (torch.expm1(gap) - gap)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * stats.entropy
        return loss

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        everywhere = torch.ones_like(stats.logprobs, dtype=torch.bool)
        result = {"entropy": stats.entropy.mean()}
        if self.surrogate != "reinforce":
            ratio = self._ratio(stats, tokens)
            # CISPO's clip stops a ratio on either side, whatever the advantage
            signal = torch.sign(ratio - 1) if self.surrogate == "cispo" else tokens.advantages
            result |= _drift(ratio, signal, *self.clip_bounds, everywhere)
        if self.kl_coef:
            gap = tokens.ref_logprobs - stats.logprobs
            result["ref_kl"] = (torch.expm1(gap) - gap).mean()
        return result


@dataclass(frozen=True)
class SRFT:
    """Single-stage supervised and reinforcement fine-tuning (arXiv 2506.19767): demonstrations, rollouts, one loss.

    Annotations: `is_demo` (bool) and `advantages`; `rewards` if positive="reward"; `old_logprobs` if the rollouts are
    not fresh; `sequence_ids` if level="sequence"; `weight_entropy` replaces H inside the weights (any level, one pass).

        demonstration   demo_sft_coef · w · (−ℓ)  −  demo_rl_coef · A · shape(p)
        rollout         v · (−signal · factor)

    demo_weight      w: "entropy" sg(e^{entropy_sign·H}) (Eq 8: sign −1), "constant" 1, "p(1-p)" sg(p(1−p)) (CHORD-φ)
    demo_shaping     shape(p): None p (Eq 9–10, behaviour policy π_β := 1), γ p/(p + γ) (LUFFY, arXiv 2504.14945)
    rollout_weight   v: on positives "entropy" rollout_coef · sg(e^H) (Eq 12), "constant" rollout_coef; on the others
                     negative_coef
    rollout_factor   "logprob" ℓ, "ratio" r, "clipped_ratio" PPO's clipped r
    rollout_signal   "sign" ±1 (Eq 11), "advantage" A
    positive         what makes a rollout positive: "reward" > 0 or "advantage" > 0
    level            over what H in the weights is averaged: "token" (none), "sequence", or "batch" (each kind apart)
    entropy_coef     −c·H on every token, differentiated through H

    The paper leaves level, signal and averaging open and public codes disagree: `srft_paper`, `srft_official` and
    `srft_hpt` name three readings.
    """

    level: str = "token"
    entropy_sign: int = -1
    demo_sft_coef: float = 0.5
    demo_weight: str = "entropy"
    demo_rl_coef: float = 1.0
    demo_shaping: float | None = None
    rollout_coef: float = 0.1
    negative_coef: float = 1.0
    rollout_weight: str = "entropy"
    rollout_factor: str = "logprob"
    rollout_signal: str = "sign"
    positive: str = "advantage"
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coef: float = 0.0

    def __post_init__(self):
        _one_of(
            self,
            level=("token", "sequence", "batch"),
            demo_weight=("entropy", "constant", "p(1-p)"),
            rollout_weight=("entropy", "constant"),
            rollout_factor=("logprob", "ratio", "clipped_ratio"),
            rollout_signal=("sign", "advantage"),
            positive=("advantage", "reward"),
        )
        _clip_range(self)
        if self.entropy_sign not in (-1, 1):
            raise ValueError(f"SRFT(entropy_sign={self.entropy_sign}): expected -1 (the paper's Eq 8) or +1")
        if self.demo_shaping is not None and not self.demo_shaping > 0:
            raise ValueError(f"SRFT(demo_shaping={self.demo_shaping}): expected None or a positive γ")

    @property
    def reads_entropy(self) -> bool:
        return "entropy" in (self.demo_weight, self.rollout_weight)

    def token_local(self, given: Collection[str]) -> bool:
        return self.level == "token" or not self.reads_entropy or "weight_entropy" in given

    def requires(self, given: Collection[str]) -> tuple[str, ...]:
        rewards = ("rewards",) if self.positive == "reward" else ()
        sequence = ("sequence_ids",) if self.level == "sequence" and not self.token_local(given) else ()
        return ("is_demo", "advantages", *rewards, *sequence)

    def inactive(self, tokens: Tokens) -> Tensor | None:
        if self.entropy_coef:
            return None
        positive = self._positive(tokens)
        demo = (tokens.advantages * self.demo_rl_coef == 0) & (self.demo_sft_coef == 0)
        coefficient = torch.where(positive, self.rollout_coef, self.negative_coef)
        return torch.where(tokens.is_demo.bool(), demo, self._signal(tokens, positive) * coefficient == 0)

    def _positive(self, tokens: Tokens) -> Tensor:
        return (tokens.rewards if self.positive == "reward" else tokens.advantages) > 0

    def _signal(self, tokens: Tokens, positive: Tensor) -> Tensor:
        if self.rollout_signal == "advantage":
            return tokens.advantages
        sign = torch.where(positive, 1.0, -1.0)
        # an advantage of 0 says nothing either way; a reward always does
        return sign if self.positive == "reward" else torch.where(tokens.advantages == 0, 0.0, sign)

    def _weight_entropy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        given = tokens.get("weight_entropy")
        entropy = stats.entropy.detach()
        if given is not None:
            return given
        if self.level == "sequence":
            return _sequence_average(entropy, tokens.sequence_ids)
        if self.level == "batch":
            demo = tokens.is_demo.bool()
            return torch.where(demo, _mean(entropy, demo), _mean(entropy, ~demo))
        return entropy

    def _weights(self, stats: TokenStats, tokens: Tokens, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Stop-gradient weights (w of the demonstration's SFT term, v of the rollout term), coefficients included."""
        entropy = self._weight_entropy(stats, tokens) if self.reads_entropy else stats.entropy.detach()
        if self.demo_weight == "entropy":
            demo = torch.exp(self.entropy_sign * entropy)
        elif self.demo_weight == "constant":
            demo = torch.ones_like(entropy)
        else:
            p = stats.logprobs.detach().exp()
            demo = p * (1 - p)
        rollout = torch.exp(entropy) if self.rollout_weight == "entropy" else torch.ones_like(entropy)
        return self.demo_sft_coef * demo, torch.where(positive, self.rollout_coef * rollout, self.negative_coef)

    def _parts(self, stats: TokenStats, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(SFT term, RL term of a demonstration, rollout term) of every token, as if it were of that kind."""
        positive = self._positive(tokens)
        demo_weight, rollout_weight = self._weights(stats, tokens, positive)
        p = stats.logprobs.exp()
        shaped = p if self.demo_shaping is None else p / (p + self.demo_shaping)
        signal = self._signal(tokens, positive)
        ratio = _ratio(stats, tokens, fresh=tokens.is_demo.bool())  # demonstrations were not sampled: anything is there
        if self.rollout_factor == "logprob":
            rollout = -signal * stats.logprobs
        elif self.rollout_factor == "ratio":
            rollout = -signal * ratio
        else:
            rollout = _clipped(ratio, signal, self.clip_low, self.clip_high)
        return -demo_weight * stats.logprobs, -self.demo_rl_coef * tokens.advantages * shaped, rollout_weight * rollout

    def __call__(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        demo_sft, demo_rl, rollout = self._parts(stats, tokens)
        loss = torch.where(tokens.is_demo.bool(), demo_sft + demo_rl, rollout)
        return loss - self.entropy_coef * stats.entropy if self.entropy_coef else loss

    def metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        """Means over the demonstration tokens and over the rollout tokens of this call."""
        demo = tokens.is_demo.bool()
        demo_sft, demo_rl, rollout = self._parts(stats, tokens)
        demo_weight, rollout_weight = self._weights(stats, tokens, positive := self._positive(tokens))
        return {
            "demo_sft_loss": _mean(demo_sft, demo),
            "demo_rl_loss": _mean(demo_rl, demo),
            "rollout_loss": _mean(rollout, ~demo),
            "demo_entropy": _mean(stats.entropy, demo),
            "rollout_entropy": _mean(stats.entropy, ~demo),
            "demo_weight": _mean(demo_weight, demo),
            "rollout_weight": _mean(rollout_weight, ~demo & positive),
            **_drift(_ratio(stats, tokens), self._signal(tokens, positive), self.clip_low, self.clip_high, ~demo),
        }


def _drift(ratio: Tensor, signal: Tensor, low: float, high: float, where: Tensor) -> dict[str, Tensor]:
    """Distance to the policy that sampled: share of tokens that the clip stops, and KL(old ‖ new) ≈ r − 1 − log r."""
    beyond = ((ratio > 1 + high) & (signal > 0)) | ((ratio < 1 - low) & (signal < 0))
    return {"clip_fraction": _mean(beyond.float(), where), "approx_kl": _mean(ratio - 1 - ratio.log(), where)}
