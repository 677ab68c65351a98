"""A whole SRFT training step, `srft.trainer.Trainer.step`: rollouts, scoring, packing, loss, backward, update.

With the fused loss and with full logits, on a Llama with random weights: tiny on a CPU, of the size of Qwen2.5-0.5B on
a GPU. Both see the same prompts; each samples from its own weights.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

import srft_kernels as sk

from . import timing
from .cases import Case, Shape
from .inputs import Unavailable
from .measure import MOST, Row, default_dtype, release
from .truth import TOLERANCE

LOSSES = {"srft_kernels": sk.linear_loss, "full logits": sk.reference.linear_loss}
MODELS = {
    "cpu": {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 32768},
    "cuda": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
}
STEPS = {
    "cpu": "--train.prompts_per_step=4 --rollout.per_prompt=2 --rollout.max_new_tokens=16 --train.token_budget=1024",
    "cuda": "--train.prompts_per_step=8 --rollout.per_prompt=8 --rollout.max_new_tokens=128 --train.token_budget=16384",
}
ROUNDS = 5


def step_case(device: str) -> Case:
    model = MODELS[kind_of(device)]
    shape = Shape(0, model["hidden_size"], model["vocab_size"])  # as many tokens as the rollouts happen to have
    return Case("training step", "srft", shape, "rollouts")


def kind_of(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"


class Recorded:
    """An engine that answers with completions sampled before, so that two trainers learn from the same ones."""

    def __init__(self, engine: Any):
        self.engine, self.memory = engine, {}

    def generate(self, prompts: list[list[int]], samples: int, **options: Any) -> list:
        key = options["seed"]
        if key not in self.memory:
            self.memory[key] = self.engine.generate(prompts, samples, **options)
        return self.memory[key]


def trainers(device: str) -> tuple[Callable[..., Any], Any]:
    """(what makes a trainer from model, loss function and engine; the model as all of them start)."""
    try:
        from srft.config import DataConfig, load
        from srft.data import Example
        from srft.model import LoadedModel
        from srft.prompts import build_prompter
        from srft.rewards import Scorer
        from srft.trainer import Trainer
        from tests.srft.conftest import byte_tokenizer, tiny_model
    except ImportError as error:
        raise Unavailable(f"the training loop needs {error.name}, which is not installed") from error
    config = load(None, ["--train.lr=1e-5", *STEPS[kind_of(device)].split()])
    questions = [f"{a} + {b}" for a in range(2, 10) for b in range(3, 7)]
    examples = [
        Example([{"role": "user", "content": q}], f"{q} = {eval(q)}\n#### {eval(q)}", str(eval(q)), "sums")
        for q in questions
    ]

    def reward(prompts: list, completions: list[str], **columns: Any) -> list[float]:
        return [len(text) % 3 / 2 for text in completions]  # something that differs between completions

    def make(model: Any, loss_function: Callable, engine: Any = None) -> Trainer:
        loaded = LoadedModel(model, byte_tokenizer(), torch.device(device), model.dtype, {0}, 0)
        prompter = build_prompter(loaded.tokenizer, DataConfig(system_prompt=""))
        return Trainer(
            config, loaded, prompter, Scorer("bench", reward), examples, engine=engine, loss_function=loss_function
        )

    model = tiny_model(**MODELS[kind_of(device)]).to(device, default_dtype(device)).train()
    return make, model


def measure_step(device: str, rounds: int | None = None) -> list[Row]:
    case = step_case(device)
    make, model = trainers(device)
    dtype = default_dtype(device)
    recorded = Recorded(make(copy.deepcopy(model), sk.linear_loss).engine)
    exact = make(copy.deepcopy(model).double(), sk.reference.linear_loss, recorded).step(1)[0]
    rows, made = {}, {}
    for name, loss_function in LOSSES.items():
        line = make(copy.deepcopy(model), loss_function, recorded).step(1)[0]
        errors = {key: abs(line[key] - exact[key]) / abs(exact[key]) for key in ("loss", "grad_norm")}
        worst = max(errors.values())
        row = rows[name] = Row(case, name, "ok" if worst <= TOLERANCE[dtype] else "wrong")
        row.extra = {
            "case": str(case),
            "task": "srft",
            "inputs": case.inputs,
            "hidden": case.shape.hidden,
            "vocab": case.shape.vocab,
            "dtype": str(dtype).removeprefix("torch."),
            "error": worst,
            "errors": errors,
            "tolerance": TOLERANCE[dtype],
            "tokens": line["demo_tokens"] + line["rollout_tokens"],
            "note": "tokens of the first step; no floor of matrix products: the backbone and sampling dominate",
        }
        if row.status == "wrong":
            row.reason = f"error {worst:.2g} (allowed {TOLERANCE[dtype]:g})"
        else:
            made[name] = make(copy.deepcopy(model), loss_function)
        release(device)
    lines: dict[str, list[dict]] = {name: [] for name in made}
    number = dict.fromkeys(made, 0)

    def step(name: str) -> None:
        number[name] += 1
        lines[name].append(made[name].step(number[name])[0])

    for name in made:
        step(name)  # warm up
    calls = {name: lambda _, name=name: step(name) for name in made}
    times = timing.take_turns(calls, [None], device, rounds or ROUNDS, MOST[kind_of(device)])
    for name, measured in times.items():
        rows[name].seconds = measured
        _, spread = timing.ratio(measured, [statistics.median(measured)] * len(measured))
        of_step = {key: statistics.median(line[key] for line in lines[name][1:])
                   for key in ("seconds_rollout", "seconds_train", "tokens_per_second")}  # fmt: skip
        rows[name].extra |= of_step | {"spread": spread, "noisy": spread > timing.NOISE[kind_of(device)]}
    return list(rows.values())
