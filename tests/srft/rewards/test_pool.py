"""Rewards in processes of their own: what hangs, crashes or is killed costs its completion and not the run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srft.config import RewardConfig
from srft.errors import UserError
from srft.rewards import build_reward
from tests.srft.rewards.conftest import FILE, example

SOURCE = """
import os, signal, sys, time

def one(completion):
    if completion == "hang":
        time.sleep(60)
    if completion == "busy":
        while True:
            pass
    if completion == "exit":
        sys.exit()
    if completion == "exit at once":
        os._exit(0)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "memory":
        raise MemoryError
    if completion == "raise":
        raise ValueError("no")
    return 1.0

def reward(completions, **kwargs):
    values = [one(each) for each in completions]
    return [value / len(values) for value in values]   # depends on the list that it gets

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return one(solution_str)

def process(completions):
    return [os.getpid() for _ in completions]

def threads(completions):
    import threading
    return [float(threading.current_thread() is threading.main_thread() and "torch" not in sys.modules)]

def printed(completions):
    print("from the reward")
    return [1.0] * len(completions)

def slow(completions):
    time.sleep(0.3 * len(completions))
    return [1.0 / len(completions) for _ in completions]

def unhurried(completions):
    time.sleep(1.5 * (completions == ["slow"]))
    return [float(each == "fast") for each in completions]

def flaky(completions):
    if len(completions) == 2:
        os._exit(1)
    return [1.0] * len(completions)

def parent(completions):
    child = os.fork()
    if not child:
        time.sleep(60)
    with open("child", "w") as file:
        file.write(str(child))
    os._exit(1)
"""


def gone(process: int) -> bool:
    """Whether it ends within some seconds."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", "took more than 1 s (reward.timeout)"),
        ("busy", "took more than 1 s (reward.timeout)"),
        ("exit", "called sys.exit(None)"),
        ("exit at once", "ended its process with code 0"),
        ("segfault", "was killed by SIGSEGV"),
        ("killed", "was killed by SIGKILL"),
        ("memory", "raised MemoryError: "),
        ("raise", "raised ValueError: no"),
    ],
)
def test_a_fault_costs_its_completion_only(write, fault, words, capfd):
    for function, expected in (("reward", 0.5), ("compute_score", 1.0)):
        scorer = write(SOURCE, function, timeout=1.0, workers=1)
        rewards = scorer([example()] * 3, ["fine", fault, "fine too"])
        assert rewards == [expected, None, expected]
        assert rewards.details == [{}, {"reward_failed": 1.0}, {}]
        told = capfd.readouterr().err.splitlines()
        name = scorer.name
        lost = f"1 of 3 completions could not be scored, the first: it {words}; metric reward_failed counts them"
        assert told == [f"warning: reward.name {name!r}: {lost}"]


def test_a_function_that_raises_on_every_completion_is_an_error_that_names_it(write):
    for function in ("reward", "compute_score"):
        scorer = write(SOURCE, function, workers=1)
        with pytest.raises(UserError) as error:
            scorer([example()] * 2, ["raise"] * 2)
        assert (
            str(error.value) == f"reward.name {scorer.name!r}: the function raised ValueError: no (--debug shows where)"
        )
        assert 'raise ValueError("no")' in str(error.value.__cause__)


def test_rewards_that_all_crash_do_not_end_the_run(write):
    scorer = write(SOURCE, workers=1)
    assert scorer([example()] * 2, ["segfault", "killed"]) == [None, None]
    assert scorer([example()] * 2, ["a", "b"]) == [0.5, 0.5]


def test_a_reward_is_called_in_the_main_thread_of_another_process_without_torch(write):
    scorer = write(SOURCE, "process", workers=2)
    (first,), (second,) = (scorer([example()], ["a"]) for _ in range(2))
    assert first == second != os.getpid()  # a function that keeps something finds it again
    assert write(SOURCE, "process", workers=0)([example()], ["a"]) == [os.getpid()]
    assert write(SOURCE, "threads", workers=1)([example()], ["a"]) == [1.0]


def test_processes_end_with_their_scorer(write):
    scorer = write(SOURCE, "process", workers=1)
    (process,) = scorer([example()], ["a"])
    os.kill(int(process), 0)
    del scorer
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_what_a_process_started_ends_with_it(write):
    scorer = write(SOURCE, "parent", timeout=20.0, workers=1)
    started = time.monotonic()
    assert scorer([example()], ["a"]) == [None]
    assert time.monotonic() - started < 15  # the child holds the connection open
    assert gone(int(Path("child").read_text()))


def worker_of_a_killed_run(tmp_path, completion: str, seconds: float = 0.0) -> int:
    """The process that has `completion` to score, `seconds` after a run that is killed then gave it out."""
    program = (
        "import sys; from tests.srft.rewards.conftest import FILE, example\n"
        "from srft.config import RewardConfig; from srft.rewards import build_reward\n"
        f"scorer = build_reward(RewardConfig('module_{tmp_path.name}:reward', workers=1), FILE)\n"
        "scorer([example()], ['a']); print(scorer.pool.started[0].process.pid, flush=True)\n"
        f"scorer([example()], [{completion!r}])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as run:
        worker = int(run.stdout.readline())
        time.sleep(seconds)
        run.kill()
    return worker


def test_processes_end_with_a_run_that_is_killed(write, tmp_path):
    write(SOURCE, workers=1)
    assert gone(worker_of_a_killed_run(tmp_path, "busy"))


def test_a_long_list_may_take_as_long_as_its_completions(write, capfd):
    scorer = write(SOURCE, "slow", timeout=1.0, workers=2)
    assert scorer([example()] * 4, ["a"] * 4) == [0.25] * 4
    assert list(scorer.patient) == [0]
    started = time.monotonic()
    assert scorer([example()] * 4, ["a"] * 4) == [0.25] * 4
    assert time.monotonic() - started < 2.6  # it is not tried again with one at a time
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("function", ["reward", "compute_score"])
def test_a_service_that_is_down_costs_a_few_calls_and_not_all(write, capfd, function):
    scorer = write(SOURCE, function, timeout=0.5, workers=2)
    assert scorer([example()], ["fine"]) == [1.0]  # and the processes are there
    started = time.monotonic()
    rewards = scorer([example()] * 64, ["hang"] * 64)
    assert time.monotonic() - started < 10  # of 16
    assert rewards == [None] * 64 and all(each["reward_failed"] == 1 for each in rewards.details)
    told = capfd.readouterr().err
    assert "64 of 64 completions could not be scored, " in told and "not tried after calls that all failed, the" in told
    assert scorer([example()], ["fine"]) == [1.0]


def test_where_most_hang_the_others_are_scored(write):
    scorer = write(SOURCE, "reward", timeout=0.5, workers=2)
    texts = (["hang"] * 3 + ["fine"]) * 2
    assert scorer([example()] * 8, texts) == [0.5 if each == "fine" else None for each in texts]


def test_a_list_that_fails_though_no_completion_does_is_scored_one_at_a_time(write, capfd):
    scorer = write(SOURCE, "flaky", workers=1)
    for _ in range(2):
        assert scorer([example()] * 2, ["a", "b"]) == [1.0, 1.0]
    assert capfd.readouterr().err.count("they are scored one at a time") == 1


def test_what_a_reward_prints_is_seen(write, capfd):
    scorer = write(SOURCE, "printed", workers=1)
    assert scorer([example()], ["a"]) == [1.0]
    assert capfd.readouterr().out == "from the reward\n"


def test_a_function_that_no_other_process_finds_is_called_in_this_one(write, monkeypatch, capfd):
    scorer = write(
        "import sys\nif 'pytest' not in sys.modules:\n    raise OSError('no device')\n" + SOURCE, "process", workers=1
    )
    for _ in range(2):
        assert scorer([example()] * 2, ["a", "b"]) == [os.getpid()] * 2
    told = capfd.readouterr().err
    assert told.count("warning: ") == 1 and "OSError: no device" in told and "in the training process" in told


def test_a_function_of_the_program_itself_is_called_in_it(monkeypatch, capfd):
    monkeypatch.setattr(sys.modules["__main__"], "reward", lambda completions: [os.getpid()], raising=False)
    assert build_reward(RewardConfig("__main__:reward", workers=1), FILE)([example()], ["a"]) == [os.getpid()]
    assert "reward.name '__main__:reward': a process of its own cannot call it" in capfd.readouterr().err


def test_a_function_that_another_process_could_call_never_gets_into_this_one(write, tmp_path):
    """Not even when a process that is to replace one cannot load it: it may hang."""
    scorer = write(SOURCE, "compute_score", workers=1)
    assert scorer([example()], ["fine"]) == [1.0]
    (module,) = tmp_path.glob("module_*.py")
    module.write_text("broken")
    assert scorer([example()] * 2, ["exit at once"] * 2) == [None, None]


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux")
def test_where_memory_runs_out_the_process_of_a_reward_goes_first(write):
    source = "def reward(completions):\n    return [float(open('/proc/self/oom_score_adj').read())]"
    assert write(source, workers=1)([example()], ["a"]) == [1000.0]


def test_columns_that_cannot_be_sent_are_scored_in_this_process(write, capfd):
    scorer = write(SOURCE + "\ndef reward(completions, x):\n    return [x[0](3)]\n", workers=1)
    assert scorer([example(x=lambda y: y)], ["a"]) == [3.0]
    assert "its columns cannot be sent there" in capfd.readouterr().err


def test_a_call_that_is_broken_off_does_not_answer_the_next_one(write, monkeypatch):
    scorer = write(SOURCE, "unhurried", workers=2)
    with monkeypatch.context() as patch:
        patch.setattr("srft.rewards.pool.wait", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scorer([example()], ["slow"])
    assert scorer([example()], ["fast"]) == [1.0]


def test_a_reward_that_forks_does_not_answer_for_others(write):
    """Neither do the children that come back from it, with an exception or by sys.exit."""
    source = (
        "import os, sys, time\ndef compute_score(data_source, solution_str, ground_truth):\n"
        "    if solution_str[0] == 'f' and os.fork() == 0:\n        {}\n"
        "    time.sleep(0.05)\n    return float(solution_str[1:])\n"
    )
    texts = [f"{'f' if n % 3 == 1 else 'x'}{n}" for n in range(8)]
    for child in ("raise ValueError('child')", "sys.exit(0)"):
        scorer = write(source.format(child), "compute_score", workers=1)
        for _ in range(3):
            assert scorer([example()] * 8, texts) == [float(n) for n in range(8)]


def test_a_process_that_ends_while_it_has_nothing_to_do_costs_nothing(write, capfd):
    scorer = write(SOURCE, "compute_score", workers=2)
    assert scorer([example()] * 4, ["fine"] * 4) == [1.0] * 4
    for worker in scorer.pool.started:
        worker.process.kill()
    assert scorer([example()] * 4, ["fine"] * 4) == [1.0] * 4
    (worker, *_) = scorer.pool.started
    worker.process.kill(), worker.process.wait()
    worker.process.poll = lambda: None  # it ends between the look and the call
    assert scorer([example()] * 4, ["fine"] * 4) == [1.0] * 4
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_a_reward_that_lets_no_thread_run_ends_with_a_run_that_is_killed(write, tmp_path):
    source = (
        'import re\ndef reward(completions):\n    return [bool(re.match(r"(a+)+$", each)) for each in completions]\n'
    )
    write(source, workers=1)
    assert gone(worker_of_a_killed_run(tmp_path, "a" * 60 + "b", seconds=1))


def test_a_closed_screen_costs_no_reward(write):
    scorer = write("import sys\nsys.stdout = None\n" + SOURCE, "compute_score", workers=1)
    assert scorer([example()] * 2, ["fine"] * 2) == [1.0] * 2


def test_a_module_that_exits_when_it_is_imported_is_named(write):
    with pytest.raises(UserError, match=r"importing 'module_.*' raised SystemExit: 3"):
        write("import sys\nsys.exit(3)\n")


def test_a_set_has_no_order_and_is_no_list_of_rewards(write):
    scorer = write("def reward(completions):\n    return {1.0, 2.0}\n", workers=1)
    with pytest.raises(UserError, match="returned set, expected a list with one reward per completion"):
        scorer([example()] * 2, ["a", "b"])


def test_what_a_reward_started_ends_with_a_run_that_is_killed(write, tmp_path):
    write(SOURCE, workers=1)
    program = (
        "from tests.srft.rewards.conftest import FILE, example\n"
        "from srft.config import RewardConfig; from srft.rewards import build_reward\n"
        f"build_reward(RewardConfig('module_{tmp_path.name}:parent', workers=1), FILE)([example()], ['a'])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as run:
        deadline = time.monotonic() + 20
        while not Path("child").exists() or not Path("child").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.kill()
    assert gone(int(Path("child").read_text()))
