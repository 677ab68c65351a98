"""Time of a whole loss (forward and all gradients) against its floor, the bare matrix products of the same shape.

    pytest bench/ --benchmark                  a table per group; extra_info carries TFLOP/s and the ratio to the floor

The floor is measured interleaved with what it is compared to: a round of one, a round of the other.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import srft_kernels as sk

TOKENS, HIDDEN, VOCAB = 2048, 576, 49152  # SmolLM2-135M
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
ROUNDS = 5


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(TOKENS, HIDDEN, generator=generator).to(DEVICE, DTYPE).requires_grad_(),
        "weight": (torch.randn(VOCAB, HIDDEN, generator=generator) / 20).to(DEVICE, DTYPE).requires_grad_(),
        "target": torch.randint(VOCAB, (TOKENS,), generator=generator).to(DEVICE),
        "advantages": torch.randn(TOKENS, generator=generator).to(DEVICE),
        "rewards": torch.randint(2, (TOKENS,), generator=generator).float().to(DEVICE),
        "is_demo": (torch.rand(TOKENS, generator=generator) < 0.3).to(DEVICE),
        "sequence_ids": (torch.arange(TOKENS) // 64).to(DEVICE),
    }


def products(count: int) -> Callable[[dict], None]:
    """Bare matrix products in chunks of 256 tokens: logits (1); with dx and dW (3); with the logits once more (4)."""

    def run(inputs: dict) -> None:
        x, w = inputs["input"].detach(), inputs["weight"].detach()
        logits, dw = x.new_empty(256, VOCAB), w.new_empty(VOCAB, HIDDEN)
        for start in range(0, TOKENS, 256):
            chunk = x[start : start + 256]
            for _ in range(max(1, count - 2)):
                torch.mm(chunk, w.t(), out=logits)
            if count >= 3:
                torch.mm(logits, w)
                dw.addmm_(logits.t(), chunk)

    return run


def srft(objective, annotations=("advantages", "rewards", "is_demo", "sequence_ids"), **options):
    def run(inputs: dict) -> None:
        columns = {name: inputs[name] for name in annotations}
        out = sk.linear_loss(inputs["input"], inputs["weight"], inputs["target"], objective, **columns, **options)
        out.loss.backward()

    return run


def scoring(inputs: dict) -> None:
    with torch.no_grad():
        sk.linear_logprobs(inputs["input"], inputs["weight"], inputs["target"])


def eager(inputs: dict) -> None:
    F.cross_entropy(F.linear(inputs["input"], inputs["weight"]).float(), inputs["target"]).backward()


def torch_fused(inputs: dict) -> None:
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(inputs["input"], inputs["weight"], inputs["target"], options=options).backward()


CASES = {
    "scoring": {"products": (products(1), 1), "srft_kernels": (scoring, 1)},
    "loss and gradients": {
        "products": (products(3), 3),
        "srft_kernels srft_paper": (srft(sk.srft_paper()), 3),
        "srft_kernels sft": (srft(sk.sft(), ()), 3),
        "srft_kernels callable": (srft(lambda stats, tokens: -tokens.advantages * stats.logprobs), 3),
        "eager cross entropy": (eager, 3),
        "F.linear_cross_entropy": (torch_fused, 3),
    },
    "two passes": {"products": (products(4), 4), "srft_kernels srft_hpt": (srft(sk.srft_hpt()), 4)},
}


@pytest.mark.parametrize("group, name", [(group, name) for group, named in CASES.items() for name in named])
def test_time(benchmark, inputs, group, name):
    run, count = CASES[group][name]
    if name == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy needs torch 2.13")
    floor, floors = CASES[group]["products"][0], []

    def before_round():
        inputs["input"].grad = inputs["weight"].grad = None
        floors.append(seconds(floor, inputs))
        inputs["input"].grad = inputs["weight"].grad = None

    benchmark.group = group
    benchmark.pedantic(lambda: synchronized(run, inputs), setup=before_round, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats:
        median, flops = benchmark.stats.stats.median, 2 * count * TOKENS * HIDDEN * VOCAB
        benchmark.extra_info |= {
            "ratio_to_products": median / statistics.median(floors),
            "tflops": flops / median / 1e12,
        }


def synchronized(run: Callable[[dict], None], inputs: dict) -> None:
    run(inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[dict], None], inputs: dict) -> float:
    start = time.perf_counter()
    synchronized(run, inputs)
    return time.perf_counter() - start
