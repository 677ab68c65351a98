"""The bench collects garbage around every provider, which takes as long as there are objects: torch's are left out."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def collections_skip_what_stays() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
