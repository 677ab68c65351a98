"""Real processes with torch.distributed between them, started once for many calls."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE = 1.0  # seconds in which the others may still tell why, once one of them has failed
ENDED = "ended"


class Ranks:
    """`ranks(function, *arguments)` calls a module's function on every rank, and returns the results in their order.

    An exception on any rank, or one that does not answer, is a RuntimeError here, and the next call gets new processes.

    begin      called with its rank by each process, before anything else
    patience   seconds for a call, with the start of the processes where there are none yet
    preload    modules that a server of forked processes imports once for all of them; none: every process for itself
    """

    def __init__(
        self,
        count: int,
        begin: Callable[[int], None],
        backend: str = "gloo",
        patience: float = 60.0,
        preload: tuple[str, ...] = (),
    ):
        self.count, self.begin, self.backend, self.patience = count, begin, backend, patience
        self.context = multiprocessing.get_context("forkserver" if preload else "spawn")
        if preload:
            self.context.set_forkserver_preload(list(preload))
        self.directory = tempfile.TemporaryDirectory()
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        message = pickle.dumps((function, arguments))
        try:
            if not self.processes:
                self._start()
            for pipe in self.pipes:
                with contextlib.suppress(BrokenPipeError):  # read below as the end of it
                    pipe.send_bytes(message)
            return self._answers()
        except BaseException:  # an interrupted call would leave its answers to the next one
            self.stop()
            raise

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        store = str(Path(tempfile.mkdtemp(dir=self.directory.name)) / "store")
        for rank in range(self.count):
            here, there = self.context.Pipe()
            asked = there, rank, self.count, store, self.begin, self.backend, self.patience
            process = self.context.Process(target=_serve, args=asked, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def _answers(self) -> list[Any]:
        deadline = time.monotonic() + self.patience
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        while waiting and (ready := connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE)
                    error = f"{ENDED}, exit status {self.processes[rank].exitcode}"
                if error:
                    failed[rank] = error
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not failed:
            failed = dict.fromkeys(waiting.values(), f"no answer within {self.patience:g} seconds")
        if failed:  # first who ended: the others may only say that they miss it
            told = sorted(failed.items(), key=lambda each: not each[1].startswith(ENDED))
            raise RuntimeError("\n".join(f"rank {rank}: {error}" for rank, error in told))
        return [results[rank] for rank in range(self.count)]


def _serve(
    pipe: connection.Connection,
    rank: int,
    count: int,
    store: str,
    begin: Callable[[int], None],
    backend: str,
    patience: float,
) -> None:
    begin(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=patience / 2),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = function(*arguments), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))
