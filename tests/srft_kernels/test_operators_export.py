"""torch.export: a program for any number of tokens, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import srft_kernels as sk

from .compiling import assert_bitwise, fresh  # noqa: F401

H, V = 8, 40
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
OBJECTIVES = {
    "sft": (sk.sft(), {}),
    "own": (lambda stats, tokens: -stats.logprobs + 0.1 * stats.entropy, {}),
    "own, none ignored": (lambda stats, tokens: -stats.logprobs, {"ignore_index": None}),
}


class Head(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, H, generator=torch.Generator().manual_seed(0)))
        self.objective, self.options = OBJECTIVES[name]

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        out = sk.linear_loss(x, self.weight, target, self.objective, **self.options)
        return out.loss, out.logprobs, *out.metrics.values()


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, length, H, generator=g), torch.randint(V, (batch, length), generator=g)


def exported(name: str, strict: bool) -> torch.export.ExportedProgram:
    sizes = {0: BATCH, 1: LENGTH}
    return torch.export.export(Head(name), inputs(2, 9), dynamic_shapes=(sizes, sizes), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_number_of_tokens(name, strict):
    module, head = exported(name, strict).module(), Head(name)
    for sizes in ((2, 9), (3, 5), (1, 2)):
        found, expected = module(*inputs(*sizes)), head(*inputs(*sizes))
        torch.testing.assert_close(found, expected)
        if name == "sft":
            assert_bitwise(found, expected)


def test_saved_and_loaded(tmp_path: Path):
    """Where the operators are known, which `import srft_kernels.operators` defines."""
    torch.export.save(exported("sft", strict=True), tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    assert_bitwise(loaded(*inputs(3, 5)), Head("sft")(*inputs(3, 5)))
