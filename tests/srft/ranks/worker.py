"""What torchrun starts in test_torchrun.py: losses, gradients and log-probs of sharded models, written by rank 0.

torchrun … -m tests.srft.ranks.worker OUT.pt
"""

import sys
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from srft.config import ModelConfig
from srft.learn.packing import pack
from srft.model import LoadedModel
from srft.model.adapters import add_adapters
from srft.model.load import checkpoint_activations
from srft.ranks import Ranks, join
from srft.rollout import Engine, Rollout
from tests.srft.test_trainer import fresh, make, some_sequences

# name: (the model's type, options of the trainer, changes of the model)
CASES = {
    "tied": (torch.float32, [], {}),
    "untied": (torch.float32, [], {"tie_word_embeddings": False}),
    "bfloat16": (torch.bfloat16, [], {}),
    "recomputed": (torch.float32, [], {"gradient_checkpointing": True}),
    "two passes": (torch.float32, ["--loss.preset", "srft_hpt"], {}),
    "adapters": (torch.float32, ["--loss.options.kl_coef", "0.3"], {"lora": True}),
    "reference": (torch.bfloat16, ["--loss.options.kl_coef", "0.3"], {}),
    "whole step": (torch.float32, ["--loss.options.level", "batch"], {"tie_word_embeddings": False}),
}


class Listening(Engine):
    needs_model, released = False, 0

    def generate(self, prompts, samples, *, numbers=None, **settings):
        return [[Rollout([number], True)] * samples for number in numbers or range(len(prompts))]

    def refresh(self, weights):
        self.weights = {name: weight.clone() for name, weight in weights}

    def release(self):
        self.released += 1


def frozen() -> LoadedModel:
    """A reference that says something else."""
    loaded = fresh(torch.bfloat16, tie_word_embeddings=False)
    loaded.model.requires_grad_(False).eval()
    return loaded


def measure(ranks: Ranks) -> dict:
    """{case: what the trainer's update on a step's microbatches computes}: loss, gradients by name, metrics."""
    results = {}
    for name, (dtype, options, changes) in CASES.items():
        changes = dict(changes)
        recompute, lora = changes.pop("gradient_checkpointing", False), changes.pop("lora", False)
        loaded = fresh(dtype, **changes)
        if lora:
            loaded.adapters = add_adapters(loaded.model, ModelConfig(lora_rank=4))
        if recompute:
            checkpoint_activations(loaded.model)
        engine, reference = Listening(), {"reference": frozen(), "adapters": loaded}.get(name)
        trainer = make(loaded, *options, ranks=ranks, engine=engine, reference=reference)
        parts = pack(some_sequences(), token_budget=25, rows=trainer.rows, rank=ranks.rank, ranks=ranks.size)
        trainer.optimizer.step, step = lambda number: {"skipped_updates": 1.0}, trainer.optimizer.step
        metrics = trainer._learn(parts, 1)
        masters = dict(zip(trainer.optimizer.names, trainer.optimizer.masters))
        gradients = {key: whole(master.grad) for key, master in masters.items()}
        update = step(0)
        weights = {key: whole(master) for key, master in masters.items()}
        logprobs, entropy = trainer._statistics(parts)
        results[name] = (
            metrics | update | {"gradients": gradients, "weights": weights, "statistics": [logprobs, entropy]}
        )
        trainer.stale = True
        with mock.patch.object(ranks, "whole", side_effect=AssertionError("nothing generates with the model")):
            rollouts = trainer._roll_out(trainer.pool, 1)
        results[name] |= {"microbatches": len(parts), "told": engine.weights}
        results[name] |= {"released": engine.released, "rollouts": rollouts}
        results[name]["local rows"] = sum(
            master.to_local().shape[0] if isinstance(master, DTensor) else len(master) for master in masters.values()
        )
    return results


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


if __name__ == "__main__":
    ranks = join()
    results = ranks.gather(measure(ranks))
    if ranks.main:
        torch.save(results, sys.argv[1])
    ranks.leave()
