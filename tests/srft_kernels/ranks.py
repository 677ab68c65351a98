"""Ranks for the tests: two and four processes with gloo between them, which all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.ranks import Ranks

from ..interpreter import interpret_fast

PRELOADED = ("torch._inductor.config", "tests.srft_kernels.cases")  # the first is what determinism imports
# with pytest-xdist, the tests that share processes are run by one worker
COUNTS = [pytest.param(n, id=f"{n} ranks", marks=pytest.mark.xdist_group(f"{n} ranks")) for n in (2, 4)]


def settle(rank: int) -> None:
    interpret_fast()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in the tests' own process, uninitialised memory holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", params=COUNTS)
def ranks(request) -> Iterator[Ranks]:
    ranks = Ranks(request.param, settle, preload=PRELOADED)
    yield ranks
    ranks.stop()
