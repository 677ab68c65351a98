"""What a piece of code costs: operations of matrix products, and the largest block of memory it makes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Counts while it is entered: flops, and `largest`, the numbers in the largest storage that anything returned."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[0:2] if name == "mm" else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.itemsize)
        return out
