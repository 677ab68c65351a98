"""How many weights training has changed, as bf16 numbers: a smaller change is lost where a model is served in bf16."""

import re

import torch
from torch import nn

Counts = dict[str, tuple[int, int]]


@torch.no_grad()
def changed(base: nn.Module, other: nn.Module) -> Counts | None:
    """{matrix, without the number of its layer: (weights that differ, weights)}; None where the models have others.

    Compared are weights rounded to bf16, in which part of the sparsity is rounding (arXiv 2511.08567).
    """
    before, after = dict(base.named_parameters()), dict(other.named_parameters())
    if {name: each.shape for name, each in before.items()} != {name: each.shape for name, each in after.items()}:
        return None
    counts: Counts = {}
    for name, weight in before.items():
        kind = re.sub(r"\.\d+\.", ".", name.removesuffix(".weight"))
        differing = int((weight.bfloat16() != after[name].bfloat16().to(weight.device)).sum())
        many, of = counts.get(kind, (0, 0))
        counts[kind] = (many + differing, of + weight.numel())
    return counts


def share(counts: Counts) -> float:
    """Of all weights."""
    many, of = map(sum, zip(*counts.values()))
    return many / of
