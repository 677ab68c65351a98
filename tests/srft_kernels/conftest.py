"""Every test here runs with uninitialised memory filled with NaN: nothing may be read before it is written."""

import pytest
import torch

from .ranks import ranks  # noqa: F401


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
