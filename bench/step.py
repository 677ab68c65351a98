"""A whole SRFT training step, `srft.trainer.Trainer.step`: scoring, packing, backbone, loss, backward, update.

With the fused loss and with full logits, on a Llama with random weights: tiny on a CPU, of the size of Qwen2.5-0.5B on
a GPU. Rollouts are sampled once and replayed, so every provider and every round learns from the same tokens, and how
long they took is told apart. Needs torch and transformers, and nothing that only the command line of srft needs.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels import LossOutput
from srft_kernels.output import Metrics

from . import memory, timing
from .cases import Case, Shape
from .inputs import Unavailable, make
from .measure import EVERYONE, Limits, Row, attempt, default_dtype, release, stage, time_all
from .timing import kind_of
from .truth import TOLERANCE

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
PROMPTS = {"cpu": 4, "cuda": 8}  # per step
ROLLOUTS = {"cpu": 2, "cuda": 8}  # of each prompt
NEW_TOKENS = {"cpu": 16, "cuda": 128}
BUDGET = {"cpu": 1024, "cuda": 16384}  # tokens per microbatch
EXACT_BUDGET = 1024  # the same for the truth: fp64 logits of a whole step would take 60 GB, and cutting changes nothing


def full_logits(input: Tensor, linear_weight: Tensor, target: Tensor, objective: Any, **options: Any) -> LossOutput:
    """The loss as one writes it: all logits, `.float()`, autograd. No target of a trainer is ignored."""
    head = {key: options.pop(key) for key in ("linear_bias", "logit_scale", "softcap", "temperature", "vocab_size")}
    token_weight = options.pop("token_weight")
    z = sk.reference.logits(input, linear_weight, **head)
    stats = sk.reference.token_stats(z if z.dtype == torch.float64 else z.float(), target)
    tokens = sk.Tokens(target, **options)
    loss = (objective(stats, tokens) * token_weight).sum()
    fields = [field.detach() for field in stats.fields()[:3]]
    return LossOutput(loss, *fields, None, Metrics(objective, stats.map(Tensor.detach), tokens))


LOSSES: dict[str, Callable[..., LossOutput]] = {"srft_kernels": sk.linear_loss, "full logits": full_logits}


def step_case(device: str) -> Case:
    model = MODELS[kind_of(device)]
    shape = Shape(0, model["hidden_size"], model["vocab_size"])  # as many tokens as the rollouts happen to have
    note = "rollouts not included; × products: of the head alone; TFLOP/s: 6 × (backbone + head) × tokens, no attention"
    return Case("training step", "srft", shape, "rollouts", note=note)


class Recorded:
    """An engine that samples once per seed and answers with that from then on. `seconds`: what sampling took."""

    def __init__(self, engine: Any, device: str):
        self.engine, self.device, self.memory, self.seconds = engine, device, {}, 0.0

    def generate(self, prompts: list[list[int]], samples: int, **options: Any) -> list:
        def sample() -> None:
            self.memory[key] = self.engine.generate(prompts, samples, **options)

        key = options["seed"]
        if key not in self.memory:
            sample()  # compiles, warms up; the second time gives the same
            self.seconds = timing.seconds(sample, self.device)
        return self.memory[key]

    def refresh(self, weights: Any) -> None:
        """It answers as before."""

    def release(self) -> None:
        """It keeps nothing."""


def trainers(device: str) -> tuple[Callable[..., Any], Any]:
    """(what makes a trainer from model, loss function, engine and token budget; the model as all of them start)."""
    from srft.config import Config, DataConfig, RolloutConfig, TrainConfig
    from srft.data import Example, build_prompter
    from srft.learn.stages import whole
    from srft.rewards import Scorer
    from srft.rollout import build_engine
    from srft.trainer import Trainer
    from tests.srft.conftest import loaded_model, tiny_model

    kind = kind_of(device)
    rollout = RolloutConfig(per_prompt=ROLLOUTS[kind], max_new_tokens=NEW_TOKENS[kind])
    questions = [f"{a} + {b}" for a in range(2, 10) for b in range(3, 7)]
    examples = [
        Example([{"role": "user", "content": q}], f"{q} = {eval(q)}\n#### {eval(q)}", str(eval(q)), "sums")
        for q in questions
    ]

    def reward(prompts: list, completions: list[str], **columns: Any) -> list[float]:
        return [len(text) % 3 / 2 for text in completions]  # something that differs between completions

    def trainer(model: Any, loss_function: Callable, engine: Any = None, budget: int = BUDGET[kind]) -> Trainer:
        config = Config(
            rollout=rollout, train=TrainConfig(lr=1e-5, prompts_per_step=PROMPTS[kind], token_budget=budget)
        )
        loaded = loaded_model(model)
        prompter = build_prompter(loaded.tokenizer, DataConfig(system_prompt=""))
        engine = engine or Recorded(build_engine(rollout.engine, loaded), device)
        scorer = Scorer("bench", reward)
        problems = [prompter.problem(each) for each in examples]
        return Trainer(whole(config, problems), loaded, prompter, scorer, engine=engine, loss_function=loss_function)

    model = tiny_model(**MODELS[kind]).to(device, default_dtype(device)).train()
    return trainer, model


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """What the training loop misses, it names in an ImportError or a UserError: Unavailable."""
    try:
        from srft.errors import UserError
    except ImportError as error:
        raise Unavailable(f"the training loop: {error}") from error
    try:
        yield
    except (ImportError, UserError) as error:
        raise Unavailable(f"the training loop: {error}") from error


def measure_step(
    device: str,
    rounds: int | None = None,
    limits: Limits | None = None,
    begin: Callable[[str], None] = lambda provider: None,
    left_out: Collection[str] = (),
    losses: dict[str, Callable[..., LossOutput]] = LOSSES,
) -> list[Row]:
    """A row per loss function, as `measure.measure`. Raises Unavailable, CaseFailed, ContextLost."""
    case, dtype, limits = step_case(device), default_dtype(device), limits or Limits()
    begin(EVERYONE)
    with stage("model and rollouts", device), packages():
        trainer, model = trainers(device)
        sampling = trainer(copy.deepcopy(model), sk.linear_loss)
        recorded = sampling.engine
        first = sampling.step(1)[0]
        del sampling
    with stage("truth in fp64", device), packages():
        exact = trainer(copy.deepcopy(model).double(), full_logits, recorded, EXACT_BUDGET).step(1)[0]
    release(device)
    tokens = int(first["demo_tokens"] + first["rollout_tokens"])
    head = model.get_output_embeddings().weight.numel()
    backbone = sum(p.numel() for p in model.parameters()) - head
    flops = 6 * (backbone * first["padded_tokens"] + head * tokens)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[..., Any]] = {}
    for name, loss_function in losses.items():
        if name in left_out:
            continue
        row = rows[name] = Row(case, name, "ok")
        begin(name)
        with attempt(row, device, limits):
            limits.check(name)
            made = trainer(copy.deepcopy(model), loss_function, recorded)
            examine(row, made, exact, tokens, dtype, device)
            calls[name] = lambda _, made=made: made.step(1)
        made = None
        if row.status != "ok":
            calls.pop(name, None)
        release(device)
    begin(EVERYONE)
    counted = replace(case, shape=Shape(tokens, case.shape.hidden, case.shape.vocab), inputs="random", ours=True)
    with stage("inputs of the floor", device):
        inputs = make(counted, device, dtype)
    time_all(counted, rows, calls, inputs, device, rounds)
    for row in rows.values():
        if row.seconds:
            middle = statistics.median(row.seconds)
            row.extra |= {
                "tflops": flops / middle / 1e12,
                "tokens_per_second": tokens / middle,
                "seconds_rollout": recorded.seconds,
            }
    return list(rows.values())


def right(row: Row, errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether a step's loss and gradient norm are as exact as they have to be; the row tells how exact."""
    error, allowed = max(errors.values()), TOLERANCE[dtype]
    row.extra |= {"error": error, "errors": errors, "tolerance": allowed}
    if not error <= allowed:
        row.status, row.reason = "wrong", f"error {error:.2g} (allowed {allowed:g})"
    return error <= allowed


def examine(row: Row, trainer: Any, exact: dict, tokens: int, dtype: torch.dtype, device: str) -> None:
    """Loss and gradient norm of the first step against fp64; the peak of the second above weights and optimizer."""
    line = trainer.step(1)[0]
    errors = {key: abs(line[key] - exact[key]) / abs(exact[key]) for key in ("loss", "grad_norm")}
    row.extra = {
        "case": str(row.case),
        "task": row.case.task,
        "inputs": row.case.inputs,
        "tokens": tokens,
        "hidden": row.case.shape.hidden,
        "vocab": row.case.shape.vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "note": row.case.note,
    }
    if not right(row, errors, dtype):
        return
    peak = memory.peak_bytes(lambda: trainer.step(1), device)
    row.extra |= {"peak_bytes": max(0, peak), "peak_from": "process" if kind_of(device) == "cpu" else "allocator"}
