"""The metrics of a step: what each is, and the sums that they are made with."""

import math
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DESCRIPTIONS = {
    "step": "step, from 1",
    "stage": "stage of train.stages, from 1",
    "loss": "the step's loss: Σ token weight · token loss",
    "demo_sft_loss": "SFT term, mean over demonstration tokens",
    "demo_rl_loss": "RL term of the demonstrations, mean over their tokens",
    "rollout_loss": "rollout term, mean over rollout tokens",
    "demo_entropy": "entropy on demonstration tokens (nats)",
    "rollout_entropy": "entropy on rollout tokens (nats)",
    "rollout_surprise": "−log p of rollout tokens, mean (nats); of samples of the policy it is near their entropy",
    "demo_entropy_weight": "e^{±H} in the SFT term, mean over demonstration tokens",
    "rollout_entropy_weight": "e^{H} in the rollout term, mean over rollout tokens",
    "demo_weight": "weight of the SFT term, coefficient included",
    "rollout_weight": "weight of positive rollout tokens, coefficient included",
    "reward_mean": "mean reward of the rollouts that were scored",
    "reward_std": "standard deviation of the same",
    "reward_demo": "mean reward of the demonstrations",
    "reward_failed": "rollouts that could not be scored: their reward hung, crashed or raised",
    "informative": "share of prompts whose rollouts got different rewards",
    "resampled": "prompts drawn in place of those whose rollouts did not differ (rollout.resample)",
    "response_tokens": "mean length of a rollout (tokens)",
    "generated_tokens": "tokens of all rollouts of the step, those that are not learned from too",
    "finished": "share of rollouts that ended by themselves",
    "clip_fraction": "share of rollout tokens beyond the clip range",
    "clip_low_fraction": "share below it, where the advantage is negative",
    "clip_high_fraction": "share above it, where the advantage is positive",
    "dual_clip_fraction": "share whose loss dual_clip bounds",
    "approx_kl": "KL(sampling policy ‖ policy), mean of r − 1 − log r over rollout tokens (nats)",
    "ref_kl": "KL(policy ‖ reference) on rollout tokens, as loss.options.kl_estimator estimates it (nats)",
    "grad_norm": "gradient norm before clipping",
    "demo_grad_norm": "norm of the loss's gradient to the hidden states that predict demonstration tokens",
    "rollout_grad_norm": "norm of the same for rollout tokens",
    "learning_rate": "learning rate",
    "updates": "updates of the step, those left out not counted",
    "skipped_updates": "updates left out because their gradient was not finite",
    "demo_tokens": "demonstration tokens in the loss",
    "rollout_tokens": "rollout tokens in the loss",
    "padded_tokens": "tokens the backbone processed in training, padding included where there is any",
    "microbatches": "microbatches",
    "seconds_rollout": "seconds in generating and scoring",
    "seconds_train": "seconds in forward, backward and update",
    "tokens_per_second": "completion tokens generated and trained on, per second of the step",
    "peak_memory_mb": "peak memory so far: of the process on a CPU, of torch on a GPU (MB)",
}


def peak_memory_mb(device: "torch.device") -> float:
    """Peak memory in MB (2²⁰ bytes): allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        import torch  # not above: `srft report` does without it

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def add_squares(
    squares: "torch.Tensor", is_demo: "torch.Tensor", gradient: "torch.Tensor"
) -> None:  # (2,), (n,), (n, H)
    """Add the squares of a gradient: to the first those of demonstrations, to the second those of rollouts."""
    of_tokens = gradient.float().square().sum(1)
    squares[0] += (of_tokens * is_demo).sum()
    squares[1] += (of_tokens * ~is_demo).sum()


def mean(values: list[float]) -> float:
    """Mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def std(values: list[float]) -> float:
    """Population standard deviation; NaN of nothing."""
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values])) if values else math.nan
