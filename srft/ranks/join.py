"""Which ranks this process is one of."""

import os

from srft.ranks.ranks import Ranks


def join(quiet: bool = True) -> Ranks:
    """The ranks that torchrun started; just this process where it did not.   quiet: one rank alone tells errors."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    from srft.ranks.torchrun import TorchRanks

    return TorchRanks(quiet)
