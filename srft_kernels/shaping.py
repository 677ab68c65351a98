"""Shapes of a ratio u of probabilities, which change how much the unlikely count (arXiv 2504.14945 and its code)."""

from __future__ import annotations

from torch import Tensor

from .correction import one_of, positive

SHAPES = ("p/(p+c)", "p^c", "c*log p", "p+c*log p")


def shape(log_u: Tensor, kind: str, c: float | None) -> Tensor:
    """u where c is None, else the shape of it."""
    if c is None:
        return log_u.exp()
    if kind == "p/(p+c)":
        u = log_u.exp()
        return u / (u + c)
    if kind == "p^c":
        return (c * log_u).exp()
    return c * log_u if kind == "c*log p" else log_u.exp() + c * log_u


def check_shape(owner: object, of: str) -> None:
    """The two options of a shape: `of`_shape, one of SHAPES, and `of`_shaping, its c > 0, or None for no shape."""
    kind, c = f"{of}_shape", f"{of}_shaping"
    one_of(owner, **{kind: SHAPES})
    positive(owner, c)
    if getattr(owner, c) is None and getattr(owner, kind) != SHAPES[0]:
        raise ValueError(f"{type(owner).__name__}({kind}={getattr(owner, kind)!r}) needs its number c: pass {c}=c > 0")
