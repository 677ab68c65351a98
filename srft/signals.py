"""SIGTERM, SIGHUP and Ctrl-C: the first one ends a run in order, the second at once.

with listening():
    ...                    # `Interrupted` is raised wherever the run is
    hold()                 # from here on a signal waits: the step is half done
    ...
    release()              # the step is done: a signal that came is raised now
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. `number` is the signal's; the text its name."""

    def __init__(self, number: int):
        self.number = number
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)


class _State:
    process = 0  # that listens
    held = False
    waiting: int | None = None  # a signal that came meanwhile
    mask: set[int] = set()  # of signals that are blocked, outside of a fork


@contextmanager
def listening() -> Iterator[None]:
    """Raise `Interrupted` on the first signal. The second has its default effect: it ends the process.

    Elsewhere than in the main thread, to which signals go, nothing is done. Signals that are ignored (nohup) stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    _State.process, _State.held, _State.waiting = os.getpid(), False, None
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.held, _State.waiting = False, None


def hold() -> None:
    """From now on a signal waits for `release`."""
    _State.held = True


def held() -> bool:
    """Is a step half done?"""
    return _State.held


def release() -> None:
    """Raise the signal that came, since `hold` or where its exception was lost: Python passes over those of a `__del__`
    and of the garbage collector's callbacks."""
    _State.held = False
    if _State.waiting is not None:
        raise Interrupted(_State.waiting)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        if signal.getsignal(each) is _interrupt:
            signal.signal(each, signal.SIG_DFL)
    if os.getpid() != _State.process:  # a child, so young that `_forget` has not run
        os.kill(os.getpid(), number)
        return
    _State.waiting = number
    if not _State.held:
        release()


def _block() -> None:
    """A signal to a process that is being forked waits until that knows what to do with it."""
    _State.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _State.mask)


def _forget() -> None:
    """A process that was forked from this one, to score rewards say, ends by a signal as any other does."""
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_DFL)
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)
