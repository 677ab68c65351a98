"""Policy gradients on sampled tokens: REINFORCE, PPO and GRPO, CISPO, GSPO, SAPO."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from .objective import Terms, Tokens, TokenStats, mean
from .ratios import LOG_RATIO_LIMIT, check_shape, clipped, larger, log_ratio, over_sequences, shape, silenced, slope


@checks.options
@dataclass(frozen=True, repr=False)
class PolicyGradient(Terms, twin="srft_kernels.rows.triton_objectives:policy_gradient"):
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

    learns_from = ("rollouts",)

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        checks.one_of(self, surrogate=("reinforce", "ppo", "cispo", "sapo"), ratio_level=("token", "sequence"))
        check_shape(self, "ratio")
        if self.ratio_shaping is not None and (self.surrogate, self.ratio_level) != ("ppo", "token"):
            raise ValueError(
                f"{name}(ratio_shaping={self.ratio_shaping}) reshapes the ratio of surrogate='ppo' and "
                f"ratio_level='token', found {self.surrogate!r} and {self.ratio_level!r}"
            )
        checks.within(self, clip_low=(0, 1), clip_high=(0, None))
        if self.ratio_shaping is not None and self.ratio_shape == "c*log p" and self._clips:
            raise ValueError(
                f"{name}(ratio_shape='c*log p', clip_low={self.clip_low}, clip_high={self.clip_high}): a clip is about "
                "1, but where nothing has changed c·log r is 0: pass clip_low=None, clip_high=None"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, found {self.dual_clip}")
        if self.dual_clip is not None and self.surrogate != "ppo":
            raise ValueError(f"{name}(dual_clip={self.dual_clip}) bounds surrogate='ppo', found {self.surrogate!r}")
        checks.above_zero(self, "tau_positive", "tau_negative")

    @property
    def steep(self) -> bool:
        return super().steep or self.surrogate == "ppo"  # r is not bounded where A < 0

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

    def _scopes(self, names: Collection[str]) -> set[str]:
        sequence = self._sequence_ratio and "old_logprobs" in names  # r = 1 on fresh data, at any level
        return super()._scopes(names) | ({"sequence"} if sequence else set())

    def requires(self, names: Collection[str]) -> tuple[str, ...]:
        return ("advantages", *super().requires(names))

    def inactive(self, tokens: Tokens) -> Tensor | None:
        return None if self.kl_coef or self.entropy_coef else tokens.advantages == 0

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        return self._surrogate(stats, tokens, tokens.advantages)

    def _surrogate(self, stats: TokenStats, tokens: Tokens, signal: Tensor) -> Tensor:  # (n,)
        """The loss of sampled tokens that should become likelier (signal > 0) or rarer (< 0): A, as a rule."""
        if self.surrogate == "reinforce":
            return silenced(-signal, stats.logprobs)
        ratio, (low, high) = self._ratio(stats, tokens, signal == 0), self.clip_bounds
        if self.surrogate == "cispo":
            return silenced(-signal * clipped(ratio.detach(), 1 - low, 1 + high), stats.logprobs)
        if self.surrogate == "sapo":
            tau = torch.where(signal > 0, torch.full_like(ratio, self.tau_positive), self.tau_negative)
            return -signal * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        loss = silenced(-signal, ratio)
        if self._clips:
            loss = larger(loss, silenced(-signal, clipped(ratio, 1 - low, 1 + high)))
        if self.dual_clip is None:
            return loss
        bound = -signal * self.dual_clip
        return torch.where((signal < 0) & (loss > bound), bound, loss)

    def _log_ratio(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """ℓ − ℓ_old or its mean over the sequence's sampled tokens, without gradient; 0 on fresh data."""
        if (old := tokens.get("old_logprobs")) is None:
            return torch.zeros_like(stats.logprobs)
        change = log_ratio(stats.logprobs.detach(), old)
        if self._sequence_ratio:
            change = over_sequences(change, tokens.sequence_ids, self._sampled(tokens))
        return change.clamp(max=LOG_RATIO_LIMIT)

    def _ratio(self, stats: TokenStats, tokens: Tokens, silent: Tensor | None = None) -> Tensor:  # (n,)
        """r or its shape, with its gradient; 1 at tokens that it does not matter to, whatever was said of them."""
        change, c = self._log_ratio(stats, tokens), self.ratio_shaping
        if silent is not None:
            change = torch.where(silent, 0, change)
        log_r = change + slope(stats.logprobs)
        if c is None or self.ratio_shape != "p/(p+c)":
            return shape(log_r, self.ratio_shape, c)
        old = tokens.get("old_logprobs")
        old = stats.logprobs.detach() if old is None else old
        old = old if silent is None else torch.where(silent, stats.logprobs.detach(), old)
        return log_r.exp() * (old.exp() + c) / (stats.logprobs.exp() + c)

    def _own_metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        drift = {} if self.surrogate == "reinforce" else self._drift(stats, tokens, tokens.advantages)
        return {"entropy": mean(tokens, stats.entropy), **drift}

    def _drift(self, stats: TokenStats, tokens: Tokens, signal: Tensor) -> dict[str, Tensor]:  # (n,)
        """Distance to the policy that sampled: shares of tokens beyond the clip, low ones where A < 0, high ones where
        A > 0, and KL(old ‖ new) ≈ r − 1 − log r."""
        change, (low, high) = self._log_ratio(stats, tokens), self.clip_bounds
        ratio, demonstrated = self._ratio(stats, tokens), self._demonstrated(tokens)
        below, above = (ratio < 1 - low) & (signal < 0), (ratio > 1 + high) & (signal > 0)
        sampled = torch.ones_like(below) if demonstrated is None else ~demonstrated
        drift = torch.expm1(change) - change.clamp(min=-LOG_RATIO_LIMIT)
        shares = {}
        if self.surrogate != "sapo":
            shares = {"clip_fraction": below | above, "clip_low_fraction": below, "clip_high_fraction": above}
        if self.dual_clip is not None:
            shares["dual_clip_fraction"] = (ratio > self.dual_clip) & (signal < 0)
        shares = {name: mean(tokens, share.to(ratio.dtype), sampled) for name, share in shares.items()}
        return {**shares, "approx_kl": mean(tokens, drift, sampled)}
