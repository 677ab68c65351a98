"""Group-relative advantages: how much better a completion did than the others of its prompt."""

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(rewards: Sequence[float | None], *, std: bool = True, eps: float = 1e-6) -> list[float]:
    """Advantages of one prompt's completions, its demonstration included (SRFT, Eq 6–7).

    `r − mean`, divided by `standard deviation + eps` if `std` (the sample deviation, as in GRPO; without it: Dr. GRPO).
    A reward of None means "not scored": it takes no part in the statistics and its advantage is 0.
    When all scored rewards are equal, every advantage is exactly 0: rounding in the mean must not leave a sign behind,
    because SRFT's rollout term looks at nothing but the sign.
    """
    scored = [reward for reward in rewards if reward is not None]
    if not scored or min(scored) == max(scored):
        return [0.0] * len(rewards)
    mean = fmean(scored)
    scale = stdev(scored) + eps if std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
