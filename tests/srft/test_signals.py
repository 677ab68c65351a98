import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from srft import signals
from srft.signals import Interrupted, hold, listening, release


def test_a_signal_is_raised_at_once_or_at_the_end_of_what_is_held():
    done = []
    with pytest.raises(Interrupted, match=r"^SIGTERM$"), listening():
        signal.raise_signal(signal.SIGTERM)
        done.append("after the signal")
    assert not done
    with pytest.raises(Interrupted, match=r"^Ctrl-C$"), listening():
        hold()
        signal.raise_signal(signal.SIGINT)
        done.append("the step")
        release()
        done.append("the next step")
    assert done == ["the step"] and not signals.held()


def test_handlers_are_put_back_and_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with listening():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SCRIPT = """
import signal, time
from srft.signals import listening
with listening():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("saving", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(second)
    assert process.wait(timeout=20) == -second


def test_a_forked_process_ends_as_any_other():
    with listening():
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        child.terminate()
        child.join(20)
    assert child.exitcode == -signal.SIGTERM


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_was_lost_is_raised_at_the_end_of_the_step():
    class Late:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # where the handler runs, and Python passes over what it raises

    went_on = []
    with pytest.raises(Interrupted), listening():
        Late()
        went_on.append("after the signal")
        release()
    assert went_on
