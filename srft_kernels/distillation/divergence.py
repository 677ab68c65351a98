"""The row operation of distillation: which divergences there are, and who computes them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..head import Head

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


class Divergence(NamedTuple):
    """What is made of a student's row p and a teacher's q, by its name in DIVERGENCES."""

    kind: str
    beta: float


class DivergenceRows(Protocol):
    """The row operation of distillation, in PyTorch (torch_rows.py) and in Triton (triton_rows.py)."""

    def divergence_and_gradient(
        self, student: Tensor, teacher: Tensor, dlogits: Tensor | None, weight: Tensor, divergence: Divergence,
        head: Head, teacher_head: Head,
    ) -> Tensor:  # (n, V), (n, V), (n, V), (n,)  # fmt: skip
        """Divergences (n,), and ∂(Σ weight·divergence)/∂(raw student logits) into `dlogits`, if given: the student's
        logits themselves, or rows of another buffer, in any type."""
