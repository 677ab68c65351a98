"""Records of runs that never were."""

import dataclasses
from typing import Any

from srft.config import Config


def a_set(name: str, rewards: list[list[float]], group: str = "task", on: str = "here") -> dict[str, Any]:
    return {
        "name": name,
        "group": group,
        "on": on,
        "samples": len(rewards[0]),
        "rewards": rewards,
        "finished": 1.0,
        "tokens": 4.0,
    }


def a_step(step: int, **metrics: float | None) -> dict[str, Any]:
    tokens = {"demo_tokens": 10, "rollout_tokens": 20, "generated_tokens": 25}
    return {"step": step, **tokens, "seconds_rollout": 2.0, "seconds_train": 1.0, **metrics}


def a_record(method: str, seed: int, sets: list[dict[str, Any]], steps: int = 2, **train: Any) -> dict[str, Any]:
    config = Config()
    settings = dataclasses.asdict(config)
    settings["train"] |= {"seed": seed, "steps": steps, **train}
    settings["data"]["seed"] = seed
    settings["run"]["dir"] = f"runs/{method}-{seed}"
    return {
        "method": method,
        "seed": seed,
        "origin": {
            "srft": "0.1.0", "commit": "abc", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11.7",
            "machine": "2 × a processor", "command": "srft train", "started": "2026-11-28T12:00:00",
        },
        "settings": settings,
        "steps": [
            a_step(n + 1, reward_mean=0.1 * n, demo_entropy=1.0, rollout_entropy=None, demo_grad_norm=3.0,
                   rollout_grad_norm=1.0)
            for n in range(steps)
        ],
        "curve": [{"step": n, "on": "here", "reward": reward} for n, reward in ((0, 0.0), (steps, 0.25 + seed))],
        "sets": sets,
    }  # fmt: skip
