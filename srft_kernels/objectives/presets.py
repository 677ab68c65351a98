"""The family by name: each preset is a choice of options; `**options` override any field of the dataclass returned.

One table of formulas, annotations and sources: docs/objectives.md.
"""

from __future__ import annotations

from typing import Any

from .cross_entropy import CrossEntropy
from .policy_gradient import PolicyGradient
from .srft import HPT, SRFT

# Rollouts of objectives with demonstrations: a policy gradient by advantages, with plain or clipped ratios.
ROLLOUTS = {"rollout_coef": 1.0, "rollout_weight": "constant", "rollout_signal": "advantage"}
UNCLIPPED = {"surrogate": "ppo", "clip_low": None, "clip_high": None}
CLIPPED = {"surrogate": "ppo"}


def sft(**options: Any) -> CrossEntropy:
    """Supervised fine-tuning, −ℓ. Usual average: token_mean."""
    return CrossEntropy(**options)


def dft(**options: Any) -> CrossEntropy:
    """Dynamic fine-tuning, −sg(p)·ℓ (arXiv 2508.05629)."""
    return CrossEntropy(**{"probability_weighted": True, **options})


def reinforce(**options: Any) -> PolicyGradient:
    """−A·ℓ."""
    return PolicyGradient(**{"surrogate": "reinforce", **options})


def grpo(**options: Any) -> PolicyGradient:
    """GRPO (arXiv 2402.03300): PPO clip 0.2; pass kl_coef=β and ref_logprobs for the KL term. Usual: sequence_mean.

    dual_clip=3.0 bounds the loss where the advantage is negative (dual-clip PPO, arXiv 1912.09729).
    """
    return PolicyGradient(**options)


def dr_grpo(**options: Any) -> PolicyGradient:
    """Dr. GRPO (arXiv 2503.20783): GRPO with A = reward − mean; average with constant_length."""
    return PolicyGradient(**options)


def dapo(**options: Any) -> PolicyGradient:
    """DAPO (arXiv 2503.14476): clip higher, 0.2 below and 0.28 above; token_mean over the global batch."""
    return PolicyGradient(**{"clip_high": 0.28, **options})


def cispo(**options: Any) -> PolicyGradient:
    """CISPO (arXiv 2506.13585): −sg(min(r, 1 + ε_high))·A·ℓ; pass clip_low=ε too for the two-sided form."""
    return PolicyGradient(**{"surrogate": "cispo", "clip_low": None, "clip_high": 4.0, **options})


def gspo(**options: Any) -> PolicyGradient:
    """GSPO (arXiv 2507.18071): sequence-level ratio; one pass where sequences fit a chunk. Usual: sequence_mean."""
    return PolicyGradient(**{"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, **options})


def sapo(**options: Any) -> PolicyGradient:
    """SAPO (arXiv 2511.20347): −A·σ(τ(r − 1))·4/τ, τ = 1 where A > 0 and 1.05 elsewhere. Usual: sequence_mean."""
    return PolicyGradient(**{"surrogate": "sapo", **options})


def srft_paper(**options: Any) -> SRFT:
    """SRFT as the paper states it (arXiv 2506.19767, Eq 8–13). What it leaves open is chosen here:

    1. H is each token's own (`level="token"`)
    2. the averages: token_weight, by default over all tokens alike
    """
    return SRFT(**{"positive": "reward", **options})


def srft_official(**options: Any) -> SRFT:
    """SRFT as the authors' training code is reported to compute it. What differs from the paper:

    1. demonstrations are weighed by e^{+H} (Eq 8: e^{−H})
    2. their RL term is −A·p/(p + 0.1), LUFFY's shape (Eq 9–10: −A·p)
    3. rollouts have −A·r with ratios, unclipped (Eq 11–12: ∓ℓ by the sign of the reward)
    4. A > 0 makes a rollout positive (Eq 12: the reward)
    5. an entropy bonus of 0.001
    6. for the caller: advantages not divided by their deviation (Eq 7: divided), average constant_length
    """
    changes = {"entropy_sign": 1, "demo_shaping": 0.1, "rollout_signal": "advantage", "entropy_coef": 0.001}
    return SRFT(**{**changes, **UNCLIPPED, **options})


def srft_hpt(**options: Any) -> SRFT:
    """SRFT as re-implemented for the HPT paper (arXiv 2509.04419). What differs from SRFT's own:

    1. H in the weights is the mean over each sequence
    2. the RL term of demonstrations is −A·p/(p + 0.1), LUFFY's shape (Eq 9–10: −A·p)
    """
    return SRFT(**{"level": "sequence", "demo_shaping": 0.1, "positive": "reward", **options})


def luffy(**options: Any) -> SRFT:
    """LUFFY (arXiv 2504.14945): demonstrations −A·p/(p + 0.1), rollouts −A·r. Usual average: constant_length.

    The other shapings of its code: demo_shaping=None for p; demo_shape="p^c", "c*log p" or "p+c*log p" with
    demo_shaping=c; demo_min and demo_max; the annotation demo_logprobs for p / π_β; ratio_shape and ratio_shaping for
    the rollouts' ratio; max_probability.
    """
    return SRFT(**{"demo_sft_coef": 0.0, "demo_shaping": 0.1, **ROLLOUTS, **UNCLIPPED, **options})


def chord(mu: float = 0.5, token_weighted: bool = False, **options: Any) -> SRFT:
    """CHORD (arXiv 2508.11408): μ·SFT on demonstrations + (1 − μ)·GRPO on rollouts; `token_weighted` is CHORD-φ.

    Each part has its own average: token_weight=token_mean(mask & is_demo) + token_mean(mask & ~is_demo).
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"chord(mu={mu}): expected a number in [0, 1]")
    changes = {
        **ROLLOUTS,
        **CLIPPED,
        "demo_sft_coef": mu,
        "demo_weight": "p(1-p)" if token_weighted else "constant",
        "demo_rl_coef": 0.0,
        "rollout_coef": 1 - mu,
        "negative_coef": 1 - mu,
    }
    return SRFT(**{**changes, **options})


def hpt(**options: Any) -> SRFT:
    """HPT (arXiv 2509.04419): −ℓ on demonstrations, Dr. GRPO on rollouts; `hpt_switch` makes the prompts' choice."""
    changes = {"demo_sft_coef": 1.0, "demo_weight": "constant", "demo_rl_coef": 0.0}
    return HPT(**{**ROLLOUTS, **CLIPPED, **changes, **options})
