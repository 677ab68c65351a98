"""Real processes with gloo between them, started once for the many calls of all tests."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..interpreter import interpret_fast

PATIENCE = 60.0  # seconds for a call


class Ranks:
    """`ranks(function, *arguments)` calls a module's function on every rank, and returns the results in their order.

    An exception on any rank, or a rank that does not answer, is an error here, and the next call gets new processes.
    """

    def __init__(self, count: int):
        self.count, self.directory = count, tempfile.TemporaryDirectory()
        self.processes: list[multiprocessing.Process] = []
        self.pipes: list[Connection] = []

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        if not self.processes:
            self._start()
        message = pickle.dumps((function, arguments))
        for pipe in self.pipes:
            pipe.send_bytes(message)
        deadline = time.monotonic() + PATIENCE
        answers = [self._answer(pipe, deadline) for pipe in self.pipes]
        if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]:
            self.stop()
            raise RuntimeError("\n".join(failed))
        return [result for result, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports torch once for all of them
        context.set_forkserver_preload(
            ["torch._inductor.config", "tests.srft_kernels.cases"]
        )  # what determinism imports
        store = Path(tempfile.mkdtemp(dir=self.directory.name)) / "store"
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.count, str(store)), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    @staticmethod
    def _answer(pipe: Connection, deadline: float) -> tuple[Any, str | None]:
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            return None, f"no answer within {PATIENCE:.0f} seconds"
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return None, "ended"


def _serve(pipe: Connection, rank: int, count: int, store: str) -> None:
    interpret_fast()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in this process, uninitialised memory holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = function(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


# with pytest-xdist, the tests that share processes are run by one worker
COUNTS = [pytest.param(n, id=f"{n} ranks", marks=pytest.mark.xdist_group(f"{n} ranks")) for n in (2, 4)]


@pytest.fixture(scope="session", params=COUNTS)
def ranks(request) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.stop()
