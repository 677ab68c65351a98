"""Processes that call rewards: one that hangs or crashes is ended and replaced, and the run goes on.

    pool = Pool(rewards, workers=2)
    pool.run([Job(0, columns, seconds=30.0), …])           # per job its parts, or a Failure

They are fresh interpreters, not forks, since a process that has used CUDA or threads cannot be forked, and not
`concurrent.futures`, whose pool is lost with one of its processes and cannot stop a call. They need neither torch
nor the program's main module, start when they are needed, and end with the pool.
"""

import contextlib
import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from typing import Any

from srft.rewards.worker import LOADED, START, Failure, Part, call

PATIENCE = 600.0  # seconds for a process to start and to import what a reward needs
TRIED = 4  # times the seconds of a call: so much time goes into calls of a reward of which none succeeds


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
        self.number = 0  # of the jobs that it was given
        self.seconds = self.deadline = self.began = 0.0
        self.loaded = False
        self.alive = True
        self.send(rewards)

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `answer` finds out
            self.connection.send_bytes(message)

    def begin(self, job: int, reward: int, columns: bytes, seconds: float) -> None:
        self.job, self.seconds, self.loaded, self.number = job, seconds, False, self.number + 1
        self.began = time.monotonic()
        self.deadline = self.began + PATIENCE
        self.send(pickle.dumps((self.number, reward, columns)))

    def answer(self) -> list[Part] | Failure | None:
        """What came of its job; None: nothing yet. A process that has ended, or is late, is no longer `alive`."""
        try:
            while self.connection.poll():
                job, message = pickle.loads(self.connection.recv_bytes())
                if job != self.number:  # of one that was broken off
                    continue
                if message != LOADED:
                    return message
                self.loaded, self.began = True, time.monotonic()
                self.deadline = self.began + self.seconds
        except (EOFError, OSError):
            return self.ended()
        if self.process.poll() is not None and not self.connection.poll():
            return self.ended()  # what it started may still hold the connection open
        if time.monotonic() < self.deadline:
            return None
        self.stop()
        if not self.loaded:
            return Failure("unloaded", f"it was not ready within {PATIENCE:g} s")
        return Failure("late", f"took more than {self.seconds:g} s (reward.timeout)")

    def ended(self) -> Failure:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self.stop()
        words = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended its process with code {code}"
        return Failure("ended" if self.loaded else "lost", words)

    def stop(self) -> None:
        """End it with all that it started."""
        if not self.alive:
            return
        self.alive = False
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone; macOS says the second
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Trials:
    """Whether calls of a reward are worth it: a service that is down must not cost a run the time of every call."""

    def __init__(self) -> None:
        self.worked: set[int] = set()  # rewards of which a call succeeded
        self.lost: dict[int, float] = {}  # seconds that went into calls that failed
        self.last: dict[int, Failure] = {}

    def note(self, job: Job, answer: list[Part] | Failure, seconds: float) -> None:
        if isinstance(answer, Failure):
            self.lost[job.reward] = self.lost.get(job.reward, 0.0) + seconds
            self.last[job.reward] = answer
        else:
            self.worked.add(job.reward)

    def in_vain(self, job: Job) -> Failure | None:
        """What would come of a call that is not worth it."""
        lost = job.reward not in self.worked and self.lost.get(job.reward, 0.0) >= TRIED * job.seconds
        return dataclasses.replace(self.last[job.reward], called=False) if lost else None


class Pool:
    """At most `workers` processes; 0: rewards are called here, without a limit of time."""

    def __init__(self, rewards: list[Any], workers: int = 0):
        self.rewards, self.workers = rewards, workers
        self.here = {i for i, each in enumerate(rewards) if not (workers and each.confined)}  # called by this process
        self.able: set[int] = set()  # those that another process could load
        self.runs = 0
        self.started: list[Worker] = []
        weakref.finalize(self, stop_all, self.started, os.getpid())

    def run(self, jobs: list[Job]) -> list[list[Part] | Failure]:
        """What came of each job, in their order.

        They are begun in none: where the first calls of a reward, of TRIED times the seconds of one, have all failed,
        they stand for the others, which fail without a call.
        """
        answers: dict[int, list[Part] | Failure] = {}
        trials, again = Trials(), set()
        self.runs += 1
        waiting = deque(random.Random(self.runs).sample(range(len(jobs)), len(jobs)))
        try:
            while waiting or self.busy():
                for number in list(waiting):
                    if failure := trials.in_vain(jobs[number]):
                        waiting.remove(number)
                        answers[number] = failure
                self._hand_out(jobs, waiting)
                wait([worker.connection for worker in self.busy()], timeout=self._patience())
                for worker in self.busy():
                    if (answer := worker.answer()) is None:
                        continue
                    number, worker.job = worker.job, None
                    reward, kind = jobs[number].reward, answer.kind if isinstance(answer, Failure) else ""
                    if kind == "lost" and number not in again:  # its process had ended for another reason
                        again.add(number)
                        waiting.appendleft(number)
                        continue
                    if kind not in ("unloaded", "lost"):
                        self.able.add(reward)
                    elif kind == "unloaded" and reward not in self.able:
                        self._keep_here(reward, answer.words)
                        continue
                    trials.note(jobs[number], answer, time.monotonic() - worker.began)
                    answers[number] = answer
        finally:  # a call that is broken off must not answer the next one
            stop_all(self.busy())
            self._forget_the_ended()
        return [answers[i] if i in answers else call(self.rewards[j.reward], j.columns) for i, j in enumerate(jobs)]

    def busy(self) -> list[Worker]:
        return [worker for worker in self.started if worker.job is not None]

    def _hand_out(self, jobs: list[Job], waiting: deque[int]) -> None:
        """Jobs for processes without one. A process is started where all have one and more are allowed."""
        while waiting:
            job = jobs[waiting[0]]
            if job.reward in self.here:
                waiting.popleft()
                continue
            self._forget_the_ended()
            free = next((worker for worker in self.started if worker.job is None), None)
            if free is None and len(self.started) == self.workers:
                return
            try:
                columns = pickle.dumps(job.columns)
            except Exception as error:
                self._keep_here(job.reward, f"its columns cannot be sent there: {error}")
                continue
            if free is None:
                free = Worker(pickle.dumps([pickle.dumps(each) for each in self.rewards]))
                self.started.append(free)
            free.begin(waiting.popleft(), job.reward, columns, job.seconds)

    def _patience(self) -> float:
        """Until the next deadline, but not so long that a process without a word is found late."""
        soonest = min((worker.deadline for worker in self.busy()), default=0.0)
        return max(0.0, min(soonest - time.monotonic(), 0.2))

    def _forget_the_ended(self) -> None:
        for worker in self.started:
            if worker.job is None and worker.process.poll() is not None:  # when it had nothing to do
                worker.stop()
        self.started[:] = [worker for worker in self.started if worker.alive]

    def _keep_here(self, reward: int, reason: str) -> None:
        if reward in self.here:
            return
        self.here.add(reward)
        print(
            f"warning: reward.name {self.rewards[reward].name!r}: a process of its own cannot call it ({reason}); it "
            "is called in the training process, where a hang or a crash of it ends the run",
            file=sys.stderr,
        )


def stop_all(workers: list[Worker], owner: int | None = None) -> None:
    if owner in (None, os.getpid()):  # a fork of this process has the list too
        for worker in workers:
            worker.stop()
