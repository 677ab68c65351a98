"""AdamW with fp32 masters, gradient clipping and the learning-rate schedule.

A learning rate of 1e-6 moves a bf16 weight by less than its rounding step, so pure bf16 training silently stands still.
Weights of a lower precision therefore get fp32 copies that the optimizer works on: gradients are added up in fp32 as
each microbatch's backward delivers them, and the model's weights are the rounded masters. The model itself stays in its
own precision, for the backbone, the rollouts and the checkpoints alike.
"""

import math

import torch
from torch import Tensor, nn

from srft import signals
from srft.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then constant, or falling to 0 at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


OPTIMIZERS = {"adamw": torch.optim.AdamW}  # by the names of train.optimizer


class Optimizer:
    """AdamW over the trainable weights of `model`. Weight decay leaves vectors (norms, biases) alone."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.config, self.fresh = config, False  # whether the next step begins with no moments
        self.names, self.weights = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
        self.masters = [p if p.dtype.itemsize >= 4 else self._master(p) for p in self.weights]
        decayed = [p for p in self.masters if p.ndim >= 2]
        others = [p for p in self.masters if p.ndim < 2]
        self.adamw = OPTIMIZERS[config.optimizer](
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for p in self.masters),
        )

    @staticmethod
    def _master(weight: Tensor) -> Tensor:
        master = weight.detach().float()

        def move_gradient(weight: Tensor) -> None:
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            weight.grad = None

        weight.register_post_accumulate_grad_hook(move_gradient)
        return master

    def begin(self, config: TrainConfig) -> None:
        """Go on with the settings of another stage. The weights stay; the moments where train.stage_moments is kept."""
        self.config, self.fresh = config, config.stage_moments == "fresh"
        for group, decay in zip(self.adamw.param_groups, (config.weight_decay, 0.0)):
            group |= {"betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": decay}

    def state(self) -> dict[str, Tensor]:
        """fp32 weights and AdamW's moments by name, the very tensors: what is loaded into them is what goes on.

        Follow a load with `write_back()`. On a sharded model they are DTensors, which torch.distributed.checkpoint
        saves and loads on any number of ranks.
        """
        state = {}
        for name, master in zip(self.names, self.masters):
            moments = self.adamw.state[master]
            if not moments:  # AdamW itself makes them in its first step
                device = master.device if self.adamw.defaults["fused"] else "cpu"
                moments["step"] = torch.zeros((), dtype=torch.float32, device=device)
                moments |= {moment: torch.zeros_like(master).detach() for moment in ("exp_avg", "exp_avg_sq")}
            state[f"weight.{name}"] = master.detach()
            state |= {f"{moment}.{name}": moments[moment] for moment in ("step", "exp_avg", "exp_avg_sq")}
        return state

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the fp32 weights to the model's."""
        for weight, master in zip(self.weights, self.masters):
            if weight is not master:
                weight.copy_(master)

    def step(self, step: int) -> dict[str, float]:
        """Clip, update, clear the gradients. An update whose gradient is not finite is left out, and counted."""
        present = [p for p in self.masters if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(present, self.config.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of a sharded model, over all ranks
        rate = learning_rate(step, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.fresh:
            signals.hold()  # what is saved until the end of the step is still of the stage before
            self.adamw.state.clear()
            self.fresh = False
        if math.isfinite(norm):
            signals.hold()  # until the step is over: between steps alone a run can be saved to go on
            self.adamw.step()
            self.write_back()
        self.adamw.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": rate, "skipped_updates": float(not math.isfinite(norm))}
