"""Peaks against a count by hand, where the answer is known."""

import pytest
import torch

import srft_kernels as sk
from bench.cases import Case, Shape
from bench.inputs import make
from bench.memory import peak_bytes
from bench.providers import OURS

MB = 2**20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_held_together_adds_up_and_what_is_freed_does_not(device):
    def one_after_the_other():
        for _ in range(3):
            torch.ones(16 * MB, device=device).mul_(2)  # 64 MiB each

    def together():
        return [torch.ones(16 * MB, device=device).mul_(2) for _ in range(3)]

    peak_bytes(one_after_the_other, device)  # threads, library buffers
    assert peak_bytes(one_after_the_other, device) == pytest.approx(64 * MB, rel=0.1)
    assert peak_bytes(together, device) == pytest.approx(192 * MB, rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_takes_its_gradients_and_the_workspace_of_its_plan(device):
    shape = Shape(1024, 256, 32768)
    case = Case("peak memory", "cross entropy", shape)
    inputs = make(case, device, torch.float32)
    call, kept = OURS.load(device).call(case.task), []
    call(inputs)
    peak = peak_bytes(lambda: kept.append(call(inputs)), device)
    gradients = 4 * (shape.tokens * shape.hidden + shape.vocab * shape.hidden)
    workspace = sk.Plan.choose(shape.tokens, shape.hidden, shape.vocab, torch.float32, device).workspace_bytes
    assert peak == pytest.approx(gradients + workspace, rel=0.15)
