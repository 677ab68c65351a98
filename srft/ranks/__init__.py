"""The processes of a run: one, or those that torchrun started."""

from srft.ranks.join import join
from srft.ranks.ranks import Ranks, broadcast

__all__ = ["Ranks", "broadcast", "join"]
