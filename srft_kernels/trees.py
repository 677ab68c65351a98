"""Results as nodes of PyTorch's trees, which DDP, FSDP, `tree_map` and exported programs walk to find the tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from torch.utils import _pytree  # has no public name yet; its registrations reach torch.utils._cxx_pytree too

Node = TypeVar("Node", bound=type)


def node(cls: Node) -> Node:
    """Register a dataclass: its fields are the children, but for those that are None. A field whose name starts with _
    belongs to the structure: it stays as it is, and a saved program has it not."""
    names = [field.name for field in fields(cls)]
    children, structure = ([name for name in names if (name[0] == "_") == hidden] for hidden in (False, True))

    def flatten(value: Any) -> tuple[list[Any], Any]:
        present = tuple(name for name in children if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], (present, tuple(getattr(value, name) for name in structure))

    def unflatten(values: Iterable[Any], context: Any) -> Any:
        present, rest = context
        return cls(**dict(zip(present, values)), **dict(zip(structure, rest)))

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values, context = flatten(value)
        return [(_pytree.GetAttrKey(name), child) for name, child in zip(context[0], values)], context

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"srft_kernels.{cls.__name__}",
        to_dumpable_context=lambda context: list(context[0]),
        from_dumpable_context=lambda present: (tuple(present), ()),
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls
