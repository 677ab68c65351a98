"""Without a GPU, Triton kernels run in Triton's interpreter; that has to be known before triton is first imported."""

import os

import pytest
import torch

from .interpreter import interpret_fast

# cuBLAS is deterministic only with a fixed workspace, and the tests ask torch for determinism
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is taken from the hub, which would be tried for a minute
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpret_fast()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `pytest -n auto`: one per core, few enough for memory; a GPU's memory is measured by one alone."""
    return 1 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)))
