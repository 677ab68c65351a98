"""Processes that call rewards: one that hangs or crashes is ended and replaced, and the run goes on.

    pool = Pool(rewards, workers=2)
    pool.run([Job(0, columns, seconds=30.0), …])           # per job its parts, or a Failure

They are fresh interpreters, not forks, since a process that has used CUDA or threads cannot be forked, and not
`concurrent.futures`, whose pool is lost with one of its processes and cannot stop a call. They need neither torch
nor the program's main module, start when they are needed, and end with the pool.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from typing import Any

from srft.rewards.worker import LOADED, START, Failure, Part, call

PATIENCE = 600.0  # seconds for a process to start and to import what a reward needs


@dataclass(frozen=True)
class Job:
    """One call: the number of a reward, its columns, and the seconds that it may take."""

    reward: int
    columns: dict[str, list]
    seconds: float


class Worker:
    """One process, and the job that it has."""

    def __init__(self, rewards: bytes):
        self.connection, theirs = Pipe()
        # A session of its own: Ctrl-C is for the run to deal with, and what a reward starts can be ended with it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno()), *map(os.path.abspath, sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.job: int | None = None
        self.seconds = self.deadline = 0.0
        self.loaded = False
        self.alive = True
        self.send(rewards)

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `answer` finds out
            self.connection.send_bytes(message)

    def begin(self, number: int, message: bytes, seconds: float) -> None:
        self.job, self.seconds, self.loaded = number, seconds, False
        self.deadline = time.monotonic() + PATIENCE
        self.send(message)

    def answer(self) -> list[Part] | Failure | None:
        """What came of its job; None: nothing yet. A process that has ended, or is late, is no longer `alive`."""
        try:
            while self.connection.poll():
                message = pickle.loads(self.connection.recv_bytes())
                if message != LOADED:
                    return message
                self.loaded, self.deadline = True, time.monotonic() + self.seconds
        except (EOFError, OSError):
            return self.ended()
        if self.process.poll() is not None and not self.connection.poll():
            return self.ended()  # what it started may still hold the connection open
        if time.monotonic() < self.deadline:
            return None
        self.stop()
        if not self.loaded:
            return Failure("unloaded", f"its process was not ready within {PATIENCE:g} s")
        return Failure("late", f"took more than {self.seconds:g} s (reward.timeout)")

    def ended(self) -> Failure:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self.stop()
        words = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Failure("ended" if self.loaded else "unloaded", f"its process {words}")

    def stop(self) -> None:
        """End it with all that it started."""
        self.alive = False
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone; macOS says the second
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Pool:
    """At most `workers` processes; 0: rewards are called here, without a limit of time. seconds: see Job."""

    rewards: list[Any]
    workers: int = 0
    local: set[int] = field(default_factory=set)  # rewards that only this process can call
    started: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.local = {i for i, each in enumerate(self.rewards) if not (self.workers and each.confined)}
        weakref.finalize(self, stop_all, self.started)

    def run(self, jobs: list[Job]) -> list[list[Part] | Failure]:
        """What came of each job, in their order."""
        answers: dict[int, list[Part] | Failure] = {}
        waiting = deque(i for i, job in enumerate(jobs) if job.reward not in self.local)
        try:
            while waiting or any(worker.job is not None for worker in self.started):
                while waiting and (worker := self.idle()):
                    number = waiting.popleft()
                    worker.begin(
                        number, pickle.dumps((jobs[number].reward, jobs[number].columns)), jobs[number].seconds
                    )
                busy = [worker for worker in self.started if worker.job is not None]
                due = min(worker.deadline for worker in busy) - time.monotonic()
                wait([worker.connection for worker in busy], timeout=max(0.0, min(due, 0.2)))
                for worker in busy:
                    answer = worker.answer()
                    if answer is not None:
                        answers[worker.job], worker.job = answer, None
        finally:  # a call that is broken off must not answer the next one
            for worker in self.started:
                if worker.job is not None:
                    worker.stop()
            self.started[:] = [worker for worker in self.started if worker.alive]
        for number, answer in answers.items():
            if isinstance(answer, Failure) and answer.kind == "unloaded":
                self.keep_here(jobs[number].reward, answer)
        return [
            answers[i] if i in answers and jobs[i].reward not in self.local else self.here(jobs[i])
            for i in range(len(jobs))
        ]

    def here(self, job: Job) -> list[Part] | Failure:
        return call(self.rewards[job.reward], job.columns)

    def keep_here(self, reward: int, failure: Failure) -> None:
        if reward not in self.local:
            self.local.add(reward)
            print(
                f"warning: reward.name {self.rewards[reward].name!r}: a process of its own cannot call it "
                f"({failure.words}); it is called in this one, where a hang or a crash of it ends the run",
                file=sys.stderr,
            )

    def idle(self) -> Worker | None:
        """A process without a job, started where all have one and more are allowed."""
        self.started[:] = [worker for worker in self.started if worker.alive]
        free = next((worker for worker in self.started if worker.job is None), None)
        if free is None and len(self.started) < self.workers:
            free = Worker(pickle.dumps([pickle.dumps(each) for each in self.rewards]))
            self.started.append(free)
        return free


def stop_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()
