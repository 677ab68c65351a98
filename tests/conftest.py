"""Without a GPU, Triton kernels run in Triton's interpreter; that has to be known before triton is first imported."""

import os
import signal
import threading

import pytest
import torch

from .interpreter import interpret_fast

# cuBLAS is deterministic only with a fixed workspace, and the tests ask torch for determinism
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is taken from the hub, which would be tried for a minute
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpret_fast()

# Signals that were ignored where these tests are started (by nohup, or as a shell's background job) are heard in them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `pytest -n auto`: one per core, few enough for memory; a GPU's memory is measured by one alone."""
    return 1 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)))
