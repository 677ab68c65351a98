"""What a reward is called by, here or in a process of its own: `call`, and `serve`, the life of such a process.

A process is started with `python -c START descriptor folder …`. Through the descriptor it gets the rewards, then jobs
(a number of its own, that of a reward, the columns); to each it answers LOADED, when its time begins to run, and what
came of it.
"""

import contextlib
import math
import os
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from srft.errors import UserError

START = "import sys; sys.path[:] = sys.argv[2:]; from srft.rewards.worker import serve; serve(int(sys.argv[1]))"
LOADED = "loaded"

Part = tuple[float | None, dict[str, float]]  # a completion's reward, None: not scored; and further numbers about it


@dataclass(frozen=True)
class Failure:
    """Why a call gave nothing. kind: "raised", "refused" (what it gave is no reward), "unloaded", "ended", "late", or
    "lost": its process had ended before it was called.   called: false where others like it had failed."""

    kind: str
    words: str
    trace: str = ""
    called: bool = True


def call(reward: Any, columns: dict[str, list]) -> list[Part] | Failure:
    """One part per completion, or why there is none; an exception does not get out."""
    try:
        return parts_of(reward.name, reward(**columns), len(columns["completions"]))
    except UserError as error:
        return Failure("refused", str(error))
    except SystemExit as error:
        return Failure("ended", f"called sys.exit({error.code!r})")
    except Exception as error:
        try:
            told = str(error)
        except Exception:  # of an exception that cannot be written
            told = "…"
        return Failure("raised", f"raised {type(error).__name__}: {told}", traceback.format_exc())


def parts_of(name: str, given: Any, count: int) -> list[Part]:
    """What a function gave, as plain numbers; UserError for what is no list of `count` rewards."""
    where = f"reward.name {name!r}"
    if isinstance(given, (str, dict)) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise UserError(f"{where}: returned {type(given).__name__}, expected a list with one reward per completion")
    if len(given) != count:
        found = f"returned {len(given)} rewards for {count} completions"
        raise UserError(f"{where}: {found}; return one number, or None, per completion")
    return [part_of(where, each, index) for index, each in enumerate(given)]


def part_of(where: str, given: Any, index: int) -> Part:
    numbers = {}
    reward = given
    if isinstance(given, dict):
        keys = [key for key in ("score", "reward") if key in given]
        if len(keys) != 1:
            found = f"a dict with {', '.join(map(repr, given)) or 'nothing'}"
            raise UserError(f"{where}: reward {index} is {found}, expected one with 'score' or 'reward'")
        reward = given[keys[0]]
        plains = {str(key): plain(each) for key, each in given.items() if key != keys[0]}
        numbers = {key: float(each) for key, each in plains.items() if isinstance(each, Real) and math.isfinite(each)}
    reward = plain(reward)
    if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
        raise UserError(f"{where}: reward {index} is {reward!r}, expected a finite number or None")
    return None if reward is None else float(reward), numbers


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as a number of Python."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # it has several
        return value


def serve(descriptor: int) -> None:
    """Answer jobs until the other side is gone."""
    os.set_inheritable(descriptor, False)  # a program that a reward starts must not hold it open
    connection, process = Connection(descriptor), os.getpid()
    guard(os.getppid(), descriptor)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, this process goes, and not the one that trains
    except OSError:
        pass
    rewards = None
    loaded: set[int] = set()
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if rewards is None:
            rewards = message
            continue
        job, number, columns = message
        try:
            reward = pickle.loads(rewards[number]) if number not in loaded else rewards[number]
            reward.load()
            columns = pickle.loads(columns)
        except BaseException as error:
            connection.send((job, Failure("unloaded", f"{type(error).__name__}: {error}")))
            continue
        rewards[number] = reward
        loaded.add(number)
        connection.send((job, LOADED))
        answer = call(reward, columns)
        if os.getpid() != process:  # what a reward forked has come back with its exception
            os._exit(1)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed
            sys.stdout.flush()  # what a function prints is not lost when its process is ended
        connection.send((job, answer))


def guard(parent: int, descriptor: int) -> None:
    """A reward that hangs must not outlive a run that was killed; it goes with all that it started.

    A process of its own sees to that, since a reward may let no thread of this one run.
    """
    worker = os.getpid()
    if os.fork():
        return
    os.close(descriptor)
    while os.getppid() == worker and alive(parent):
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
