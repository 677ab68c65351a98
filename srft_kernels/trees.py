"""Results as nodes of PyTorch's trees, which DDP, FSDP, `tree_map` and exported programs walk to find the tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch.utils import _pytree  # has no public name yet; its registrations reach torch.utils._cxx_pytree too

Node = TypeVar("Node", bound=type)


def node(cls: Node) -> Node:
    """Register a dataclass: its fields are the children, but for those that are None. torch.load knows it, too."""
    names = [field.name for field in fields(cls)]

    def flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        present = tuple(name for name in names if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], present

    def unflatten(values: Iterable[Any], present: tuple[str, ...]) -> Any:
        return cls(**dict(zip(present, values)))

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        values, present = flatten(value)
        return [(_pytree.GetAttrKey(name), child) for name, child in zip(present, values)], present

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"srft_kernels.{cls.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])
    return cls
