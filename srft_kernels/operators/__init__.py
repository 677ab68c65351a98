"""The loss head under torch.compile: operators of PyTorch, and the public functions as Dynamo traces them.

Importing it defines the operators, which a process that loads an exported program needs.
"""

from . import definitions

__all__ = ["definitions"]
