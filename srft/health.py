"""What the metrics of a run say of its health: what is wrong in its last steps, and what to try."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from srft.metrics import mean

RECENT = 8  # steps that are looked at; fewer say nothing, but of single spikes
Steps = Sequence[dict[str, Any]]


def health(steps: Steps) -> list[str]:
    """A sentence for each thing that is wrong. Of a run of several stages, in the one that it is in."""
    stage = steps[-1].get("stage") if steps else None
    steps = [each for each in steps if each.get("stage") == stage]
    return [told for rule in RULES if (told := rule(steps))]


def recent(steps: Steps, key: str) -> float:
    """Mean over the last steps; NaN where too few have it."""
    values = known(steps[-RECENT:], key)
    return mean(values) if len(steps) >= RECENT and len(values) > RECENT / 2 else math.nan


def known(steps: Steps, key: str) -> list[float]:
    return [each[key] for each in steps if each.get(key) is not None]


def no_advantage(steps: Steps) -> str:
    reward = recent(steps, "reward_mean")
    if recent(steps, "informative") != 0 or abs(recent(steps, "reward_demo") - reward) > 1e-6:
        return ""  # against a demonstration of another reward all rollouts have an advantage
    found = f"the rollouts of each prompt all got the same reward in the last {RECENT} steps ({reward:.2f} on average)"
    easier = "harder prompts" if reward > 0.5 else "easier prompts, or SFT first (train.stages)"
    return f"No advantages: {found}, so that they do not say what is better. Try {easier}, more rollout.per_prompt"


def collapse(steps: Steps) -> str:
    solved = recent(steps, "reward_mean") > 0.9
    if solved or not (recent(steps, "rollout_entropy") < 0.02 and recent(steps, "informative") <= 0.1):
        return ""
    found = f"the entropy of rollouts is {recent(steps, 'rollout_entropy'):.3f} nats, and rollouts hardly differ"
    return f"Entropy collapse: {found}. Try a smaller train.lr, or go back to an earlier checkpoint"


def lengths(steps: Steps) -> str:
    first, last = mean(known(steps[:RECENT], "finished")), recent(steps, "finished")
    before, now = mean(known(steps[:RECENT], "response_tokens")), recent(steps, "response_tokens")
    if not (last < first - 0.2 and now > before):
        return ""
    found = f"rollouts grew from {before:.0f} to {now:.0f} tokens, and {last:.0%} end by themselves, after {first:.0%}"
    return f"Length runs away: {found}. Try loss.mask_truncated, loss.average sequence, more rollout.max_new_tokens"


def drift(steps: Steps) -> str:
    if not recent(steps, "approx_kl") > 0.05:
        return ""
    found = f"a step moves the policy {recent(steps, 'approx_kl'):.3f} nats from the one that sampled"
    return f"KL grows: {found}. Try a smaller train.lr, or fewer train.updates_per_rollout"


def spikes(steps: Steps) -> str:
    norms = [(each["step"], each["grad_norm"]) for each in steps if each.get("grad_norm") is not None]
    usual = median([norm for _, norm in norms] or [0.0])
    step, most = max(norms[-RECENT:], key=lambda each: each[1], default=(0, 0.0))
    if len(norms) < RECENT or most <= 10 * usual or not usual:
        return ""
    found = f"the gradient of step {step} has norm {most:.3g}, {most / usual:.0f} times the median"
    return f"Gradient spike: {found}. Look at samples.jsonl there; try a smaller train.lr or train.max_grad_norm"


def left_out(steps: Steps) -> str:
    if not (skipped := mean(known(steps[-RECENT:], "skipped_updates"))) > 0:
        return ""
    return f"Not finite: {skipped:.0%} of the last updates had no finite gradient. Try a smaller train.lr"


def stale(steps: Steps) -> str:
    """Samples of a model are on average as surprising to it as its entropy says."""
    surprise, entropy = recent(steps, "rollout_surprise"), recent(steps, "rollout_entropy")
    if not surprise > 1.2 * entropy + 0.2:
        return ""
    found = f"rollouts have −log p of {surprise:.2f} nats per token, samples of the model would have {entropy:.2f}"
    return f"Stale engine: {found}. It generates with other weights, or in another way, than the loss assumes"


def unscored(steps: Steps) -> str:
    if not (failed := sum(known(steps[-RECENT:], "reward_failed"))):
        return ""
    return f"Rewards fail: {failed:.0f} of the last rollouts could not be scored. See the warnings of the run"


RULES: list[Callable[[Steps], str]] = [no_advantage, collapse, lengths, drift, spikes, left_out, stale, unscored]
