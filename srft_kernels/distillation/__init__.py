"""Distillation: an engine of its own on the same chunks, and the row operation that it needs in PyTorch and Triton."""

from .divergence import DIVERGENCES
from .engine import DistillationOutput

__all__ = ["DIVERGENCES", "DistillationOutput"]
