"""16-bit products with fp32 results, which torch has on CUDA alone, done on a CPU; and the memory a call holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.host import mixing

aten = torch.ops.aten


class _Products(TorchDispatchMode):
    """Those of HeadProducts, in fp32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (aten.mm.dtype, aten.mm.dtype_out):
            product = args[0].float() @ args[1].float()
            return kwargs["out"].copy_(product) if kwargs else product
        if function is aten.addmm.dtype_out:
            total, a, b = args[:3]
            product = a.float() @ b.float()
            return total.copy_(product if kwargs.get("beta", 1) == 0 else total + product)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def mixed_products() -> Iterator[None]:
    """The loss head as on CUDA, where 16-bit operands are not widened and ∂L/∂a has a buffer of its own."""
    with mixing(), _Products():
        yield


class Held(TorchDispatchMode):
    """Bytes of storages made and still alive while it is entered: now, and at most."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.before: set[int] = set()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and (key := value.untyped_storage()._cdata) not in self.storages:
                self.before.add(key)
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.before:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now)
        return out

    @property
    def now(self) -> int:
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(size for _, size in self.storages.values())
