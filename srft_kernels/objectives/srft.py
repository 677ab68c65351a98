"""Demonstrations and rollouts in one loss: SRFT, of which LUFFY, CHORD and HPT are other options (presets.py).

The rollouts' policy gradient is that of policy_gradient.py, whose options it has.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .. import checks
from .objective import SCOPES, Tokens, TokenStats, mean
from .policy_gradient import PolicyGradient
from .ratios import LOG_RATIO_LIMIT, check_shape, clipped, log_ratio, over_sequences, shape, silenced, slope


@checks.options
@dataclass(frozen=True, repr=False)
class SRFT(PolicyGradient, twin="srft_kernels.rows.triton_objectives:srft"):
    """Single-stage supervised and reinforcement fine-tuning (arXiv 2506.19767): demonstrations, rollouts, one loss.

    Annotations: `is_demo` (bool) and `advantages`; `rewards` if positive="reward"; `old_logprobs` if the rollouts are
    not fresh; `sequence_ids` if level="sequence"; `weight_entropy` replaces H inside the weights (any level, one pass);
    `demo_logprobs` where the log-probs of the policy π_β that wrote the demonstrations are known (else π_β := 1).

        demonstration   demo_sft_coef · w · (−ℓ)  −  demo_rl_coef · A · shape(u),  u = p / π_β
        rollout         v · (surrogate of the policy gradient, with the signal in place of A)

    demo_weight      w: "entropy" sg(e^{entropy_sign·H}) (Eq 8: sign −1), "constant" 1, "p" sg(p) (DFT),
                     "p(1-p)" sg(p(1−p)) (CHORD-φ)
    demo_shaping     None: shape(u) = u (Eq 9–10); a number c > 0: demo_shape
    demo_shape       "p/(p+c)" u/(u + c) (LUFFY, arXiv 2504.14945), "p^c" u^c, "c*log p" c·log u,
                     "p+c*log p" u + c·log u
    demo_min/max     bounds of shape(u), beyond which it is constant; None: none
    rollout_weight   v: on positives "entropy" rollout_coef · sg(e^H) (Eq 12), "constant" rollout_coef; on the others
                     negative_coef
    rollout_signal   "sign" ±1 (Eq 11), "advantage" A
    positive         what makes a rollout positive: "reward" > 0 or "advantage" > 0
    level            over what H in the weights is averaged: "token" (none), "sequence", or "batch" (each kind apart)

    The rest are PolicyGradient's, for the rollouts. The paper leaves level, signal and averaging open and public codes
    disagree: `srft_paper`, `srft_official` and `srft_hpt` name three readings.
    """

    surrogate: str = "reinforce"
    level: str = "token"
    entropy_sign: int = -1
    demo_sft_coef: float = 0.5
    demo_weight: str = "entropy"
    demo_rl_coef: float = 1.0
    demo_shape: str = "p/(p+c)"
    demo_shaping: float | None = None
    demo_min: float | None = None
    demo_max: float | None = None
    rollout_coef: float = 0.1
    negative_coef: float = 1.0
    rollout_weight: str = "entropy"
    rollout_signal: str = "sign"
    positive: str = "advantage"

    def __post_init__(self):
        super().__post_init__()
        checks.one_of(
            self,
            level=SCOPES,
            demo_weight=("entropy", "constant", "p", "p(1-p)"),
            rollout_weight=("entropy", "constant"),
            rollout_signal=("sign", "advantage"),
            positive=("advantage", "reward"),
        )
        if self.entropy_sign not in (-1, 1):
            raise ValueError(f"SRFT(entropy_sign={self.entropy_sign}): expected -1 (the paper's Eq 8) or +1")
        check_shape(self, "demo")
        if None not in (self.demo_min, self.demo_max) and not self.demo_min <= self.demo_max:
            raise ValueError(f"SRFT(demo_min={self.demo_min}, demo_max={self.demo_max}): expected demo_min ≤ demo_max")

    @property
    def learns_from(self) -> tuple[str, ...]:
        coefs = {
            "demonstrations": (self.demo_sft_coef, self.demo_rl_coef, self.entropy_coef),
            "rollouts": (self.rollout_coef, self.negative_coef, self.entropy_coef, self.kl_coef),
        }
        return tuple(kind for kind, those in coefs.items() if any(those))

    @property
    def reads_entropy(self) -> bool:
        return "entropy" in (self.demo_weight, self.rollout_weight)

    def _meaningful(self, tokens: Tokens) -> Tokens:
        """Annotations as 0 on the kind that has none: anything may be there, and 0 · NaN would reach a gradient."""
        demo, by_reward = self._demonstrated(tokens), self.positive == "reward"
        unread = {  # on demonstrations, on rollouts
            **dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs"), (True, False)),
            "demo_logprobs": (False, True),
            "rewards": (by_reward, False),
            "advantages": (not self.demo_rl_coef, by_reward and self.rollout_signal == "sign"),
            "weight_entropy": (
                not self.demo_sft_coef or self.demo_weight != "entropy", self.rollout_weight != "entropy"
            ),
        }  # fmt: skip
        where = {
            name: demo if not on_rollouts else torch.ones_like(demo) if on_demos else ~demo
            for name, (on_demos, on_rollouts) in unread.items()
            if name in tokens and (on_demos or on_rollouts)
        }
        return tokens.replace(**{name: torch.where(there, 0, tokens.get(name)) for name, there in where.items()})

    def _demonstrated(self, tokens: Tokens) -> Tensor:
        return tokens.is_demo.bool()

    def _scopes(self, names: Collection[str]) -> set[str]:
        of_entropy = {self.level} if self.reads_entropy and "weight_entropy" not in names else set()
        return super()._scopes(names) | of_entropy

    def requires(self, names: Collection[str]) -> tuple[str, ...]:
        rewards = ("rewards",) if self.positive == "reward" else ()
        return ("is_demo", *super().requires(names), *rewards)

    def inactive(self, tokens: Tokens) -> Tensor | None:
        if self.entropy_coef or self.kl_coef:
            return None
        positive = self._positive(tokens)
        demo = (tokens.advantages * self.demo_rl_coef == 0) & (self.demo_sft_coef == 0)
        silent = torch.where(positive, self.rollout_coef == 0, self.negative_coef == 0)
        silent = (silent & ~self._success(tokens).isnan()) | (self._signal(tokens, positive) == 0)
        return torch.where(self._demonstrated(tokens), demo, silent)

    def _success(self, tokens: Tokens) -> Tensor:
        return tokens.rewards if self.positive == "reward" else tokens.advantages

    def _positive(self, tokens: Tokens) -> Tensor:
        return self._success(tokens) > 0

    def _signal(self, tokens: Tokens, positive: Tensor) -> Tensor:  # (n,)
        if self.rollout_signal == "advantage":
            return tokens.advantages
        sign = torch.where(positive, torch.ones_like(tokens.advantages), -1)
        # an advantage of 0 says nothing either way; a reward always does
        return sign if self.positive == "reward" else torch.where(tokens.advantages == 0, 0, sign)

    def needs_of_step(self, names: Collection[str]) -> tuple[str, ...]:
        return ("weight_entropy",) if "batch" in self._scopes(names) else ()

    def weight_entropy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        passed, entropy = tokens.get("weight_entropy"), stats.entropy.detach()
        if passed is not None:
            return passed
        if self.level == "sequence":
            return over_sequences(entropy, tokens.sequence_ids, tokens.averaged())
        if self.level == "batch":  # sums in a fixed order, on a GPU too
            demo = self._demonstrated(tokens)
            return torch.where(demo, mean(tokens, entropy, demo), mean(tokens, entropy, ~demo))
        return entropy

    def entropy_weights(self, stats: TokenStats, tokens: Tokens) -> tuple[Tensor, Tensor]:
        entropy = self.weight_entropy(stats, tokens)
        return torch.exp(self.entropy_sign * entropy), torch.exp(entropy)

    def _weights(self, stats: TokenStats, tokens: Tokens, positive: Tensor) -> tuple[Tensor, Tensor]:  # (n,)
        """Stop-gradient weights (w of the demonstration's SFT term, v of the rollout term), coefficients included."""
        entropy = self.weight_entropy(stats, tokens) if self.reads_entropy else stats.entropy.detach()
        p = stats.logprobs.detach().exp()
        demo = {
            "entropy": lambda: torch.exp(self.entropy_sign * entropy),
            "constant": lambda: torch.ones_like(p),
            "p": lambda: p,
            "p(1-p)": lambda: p * (1 - p),
        }
        rollout = torch.exp(entropy) if self.rollout_weight == "entropy" else torch.ones_like(entropy)
        weight = self.demo_sft_coef * demo[self.demo_weight]()
        rollout_weight = torch.where(positive, self.rollout_coef * rollout, self.negative_coef)
        success = self._success(tokens)  # a NaN is neither positive nor negative, and not hidden
        return weight, torch.where(success.isnan(), success, rollout_weight)

    def _shaped(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        """shape(u)."""
        log_u, written = stats.logprobs, tokens.get("demo_logprobs")
        if written is not None:
            log_u = log_ratio(log_u.detach(), written).clamp(max=LOG_RATIO_LIMIT) + slope(log_u)
        shaped = shape(log_u, self.demo_shape, self.demo_shaping)
        low, high = -inf if self.demo_min is None else self.demo_min, inf if self.demo_max is None else self.demo_max
        return shaped if (low, high) == (-inf, inf) else clipped(shaped, low, high)

    def _parts(self, stats: TokenStats, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(SFT term, RL term of a demonstration, rollout term) of every token, as if it were of that kind."""
        positive = self._positive(tokens)
        demo_weight, rollout_weight = self._weights(stats, tokens, positive)
        sft = rl = torch.zeros_like(stats.logprobs)
        if self.demo_sft_coef:
            sft = silenced(-demo_weight, stats.logprobs)
        if self.demo_rl_coef:
            rl = silenced(-self.demo_rl_coef * tokens.advantages, self._shaped(stats, tokens))
        rollout = self._surrogate(stats, tokens, self._signal(tokens, positive))
        silent = 0 in (self.rollout_coef, self.negative_coef)
        return sft, rl, silenced(rollout_weight, rollout) if silent else rollout_weight * rollout

    def _policy(self, stats: TokenStats, tokens: Tokens) -> Tensor:
        demo_sft, demo_rl, rollout = self._parts(stats, tokens)
        return torch.where(self._demonstrated(tokens), demo_sft + demo_rl, rollout)

    def _own_metrics(self, stats: TokenStats, tokens: Tokens) -> dict[str, Tensor]:
        """Means over the demonstration tokens and over the rollout tokens of this call."""
        demo = self._demonstrated(tokens)
        demo_sft, demo_rl, rollout = self._parts(stats, tokens)
        demo_weight, rollout_weight = self._weights(stats, tokens, positive := self._positive(tokens))
        return {
            "demo_sft_loss": mean(tokens, demo_sft, demo),
            "demo_rl_loss": mean(tokens, demo_rl, demo),
            "rollout_loss": mean(tokens, rollout, ~demo),
            "demo_entropy": mean(tokens, stats.entropy, demo),
            "rollout_entropy": mean(tokens, stats.entropy, ~demo),
            "demo_weight": mean(tokens, demo_weight, demo),
            "rollout_weight": mean(tokens, rollout_weight, ~demo & positive),
            **self._drift(stats, tokens, self._signal(tokens, positive)),
        }


class HPT(SRFT, twin="srft_kernels.rows.triton_objectives:srft"):
    """SRFT's terms for batches in which a prompt teaches by its rollouts or its demonstration (arXiv 2509.04419)."""

    switches = True
