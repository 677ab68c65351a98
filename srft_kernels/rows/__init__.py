"""Row backends: the same three functions (`statistics`, `loss_and_gradient`, `gradient`) in PyTorch and in Triton."""

from __future__ import annotations

from types import ModuleType

BACKENDS = ("torch", "triton")


def backend(name: str) -> ModuleType:
    """The module of a row backend, imported when first asked for: Triton is optional."""
    if name == "torch":
        from . import torch_rows

        return torch_rows
    if name == "triton":
        try:
            from . import triton_rows
        except ImportError as error:
            raise ImportError("the triton row backend needs triton ≥ 3.6: pip install triton") from error
        return triton_rows
    raise ValueError(f"unknown row backend {name!r}: expected one of {', '.join(BACKENDS)}")
