"""What a filtered backward costs in exactness, by columns kept: hidden states and head of the embedded SmolLM2-135M.

    python -m bench.filtering [--tokens 1024]

Errors are ‖found − dense‖ / ‖dense‖ of the SFT loss's gradients; "no mean": dx if the tail were dropped from it too.
Time is CPU time over that of the dense loss, median of three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.filter import Filtered

from .cases import Case, Shape
from .inputs import Inputs, make


def gradients(inputs: Inputs, filter: sk.Filter | None) -> tuple[sk.LossOutput, Tensor, Tensor, float]:
    (n, hidden), vocab = inputs.input.shape, len(inputs.weight)
    plan = sk.Plan.choose(n, hidden, vocab, inputs.input.dtype, "cpu", filter=filter)
    leaves = inputs.leaves()
    start = time.process_time()
    out = sk.linear_loss(leaves.input, leaves.weight, inputs.target, sk.sft(), plan=plan)
    out.loss.backward()
    return out, leaves.input.grad, leaves.weight.grad, time.process_time() - start


def without_mean(self: Filtered, products, dlogits, filter) -> None:
    INIT(self, products, dlogits, filter)
    self.tail.zero_()


INIT = Filtered.__init__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    inputs = make(Case("", "cross entropy", Shape(tokens, 576, 49152), "model"), "cpu", torch.float32)
    dense, dx, dw, _ = gradients(inputs, None)
    print(f"{tokens} tokens, mean entropy {dense.entropy.mean():.2f} nats, median {dense.entropy.median():.2f}\n")
    print("| columns kept | dropped norm | dx | dx, no mean | dW | time |\n|---|---|---|---|---|---|")
    for kept in (64, 32, 16, 8, 4):
        filter = sk.Filter(1 / kept, max_relative_error=9)
        out, found_dx, found_dw, _ = gradients(inputs, filter)
        with mock.patch.object(Filtered, "__init__", without_mean):
            plain_dx = gradients(inputs, filter)[1]
        taken = [gradients(inputs, filter)[3] / gradients(inputs, None)[3] for _ in range(3)]
        errors = [float((a - b).norm() / b.norm()) for a, b in ((found_dx, dx), (plain_dx, dx), (found_dw, dw))]
        norm = f"{out.metrics['filtered_norm']:.1e}"
        print(f"| 1/{kept} |", " | ".join([norm, *(f"{error:.1e}" for error in errors)]),
              f"| {statistics.median(taken):.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
