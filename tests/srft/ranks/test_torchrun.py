"""`srft train` under torchrun: real processes, gloo between them, and one process to compare with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from srft.checkpoint import resumable
from srft.config import ModelConfig
from srft.model import load_model
from srft.ranks import Ranks
from srft.run import run
from srft.rundir import read_status
from srft.settings import load
from tests.srft.ranks.worker import CASES, measure

pytestmark = pytest.mark.xdist_group("torchrun")  # its runs are compared with each other

ROOT = Path(__file__).parents[3]
STEPS, DIES_IN_STEP = 4, 4
# What may differ: the clock, and the cut into microbatches.
COSTS = ("seconds_rollout", "seconds_train", "tokens_per_second", "peak_memory_mb", "padded_tokens", "microbatches")
REWARD = f"""
import os

calls = 0  # one for the evaluation before training, and one per step


def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ.get("RANK") == os.environ.get("DIES", "none") and calls == 1 + {DIES_IN_STEP}:
        os.kill(os.getpid(), 9)
    return [sum(ord(c) % 2 == 0 for c in text) / (len(text) or 1) for text in completions]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_dir) -> Path:
    """Where the runs lie, their data, and the module of their reward function."""
    directory = tmp_path_factory.mktemp("distributed")
    (directory / "parity.py").write_text(REWARD)
    rows = [{"prompt": f"{'1 + ' * (n % 5)}{n}", "demonstration": f"#### {n + n % 5}"} for n in range(30)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(model: Path, run_dir: Path) -> list[str]:
    small = {
        "model.path": model,
        "model.device": "cpu",
        "data.train_file": run_dir.parent / "sums.jsonl",
        "run.dir": run_dir,
        "run.checkpoint_every": 2,
        "reward.name": "parity:reward",
        "reward.workers": 0,  # where it can kill its rank
        "train.steps": STEPS,
        "train.prompts_per_step": 5,
        "train.token_budget": 400,
        "train.lr": 1e-3,
        "rollout.per_prompt": 3,
        "rollout.max_new_tokens": 8,
        "eval.prompts": 3,
        "eval.samples": 2,
    }
    return [f"--{key}={value}" for key, value in small.items()]


def start(count: int, *command: str, path: Path, **environment: str) -> subprocess.Popen:
    """`count` ranks on this machine; DIES=1 in the environment: rank 1 is killed in its last step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *command], cwd=ROOT, env=environment, **pipes)


def torchrun(count: int, *command: str, path: Path, **environment: str) -> subprocess.CompletedProcess:
    with start(count, *command, path=path, **environment) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def one(tiny_dir, directory) -> Path:
    """The run of one process."""
    sys.path.insert(0, str(directory))
    try:
        return run(load(None, settings(tiny_dir, directory / "one"))).directory
    finally:
        sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def killed(tiny_dir, directory) -> tuple[Path, subprocess.CompletedProcess]:
    """The same run of two ranks, one of which is killed in the last step."""
    ended = torchrun(2, "srft", "train", *settings(tiny_dir, directory / "two"), path=directory, DIES="1")
    return directory / "two", ended


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_steps(run_dir: Path, one: Path, steps: int) -> None:
    ours, theirs = lines(run_dir / "metrics.jsonl"), lines(one / "metrics.jsonl")[:steps]
    assert [line["step"] for line in ours] == list(range(1, steps + 1))
    for line, expected in zip(ours, theirs):
        expected = {key: value for key, value in expected.items() if key not in COSTS}
        assert expected == pytest.approx({key: line[key] for key in expected}, rel=1e-4, abs=1e-7)
    assert lines(run_dir / "samples.jsonl") == lines(one / "samples.jsonl")[: 2 * steps]
    before, expected = lines(run_dir / "evaluation.jsonl")[0], lines(one / "evaluation.jsonl")[0]
    assert before.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)  # its rows are packed otherwise
    assert before == expected


def same_model(run_dir: Path, one: Path) -> None:
    ours, theirs = (load_model(ModelConfig(str(each / "final"), device="cpu")).model for each in (run_dir, one))
    start = load_model(ModelConfig(load(str(one / "config.toml")).model.path, device="cpu")).model
    for a, b, first in zip(ours.parameters(), theirs.parameters(), start.parameters()):
        assert (a - b).norm() <= 1e-3 * (b - first).norm()


def test_two_ranks_do_what_one_process_does(one, killed):
    assert any(line["microbatches"] % 2 for line in lines(one / "metrics.jsonl"))  # of odd ones a rank has one less
    same_steps(killed[0], one, DIES_IN_STEP - 1)


def test_only_one_rank_prints_and_writes(killed):
    run_dir, ended = killed
    assert ended.stdout.count("writing to") == ended.stdout.count("evaluating 3 held-out prompts") == 1
    assert (ended.stdout + ended.stderr).count("held-out after 0 of 4 steps") == 1
    assert len(lines(run_dir / "evaluation.jsonl")) == 1 and len(lines(run_dir / "samples.jsonl")) == 2 * 3


def test_a_rank_that_dies_is_named_once_and_leaves_the_last_checkpoint(killed):
    run_dir, ended = killed
    told = [line for line in ended.stderr.splitlines() if line.startswith("srft: ")]
    assert ended.returncode != 0 and len(told) == 1, ended.stderr
    assert re.match(
        r"srft: error: rank 1 of 2 ended without a word .*its last checkpoint is .*two/checkpoint-2", told[0]
    )
    assert f"srft train --resume {run_dir} goes on" in told[0]
    status = read_status(run_dir)
    assert status["state"] == "failed" and status["reason"].startswith("rank 1 of 2 ended without a word")
    assert status["step"] == DIES_IN_STEP - 1 and status["resume"] == f"srft train --resume {run_dir}"
    assert not list(run_dir.glob(".*")) and sorted(run_dir.glob("checkpoint-*")) == [run_dir / "checkpoint-2"]
    assert load_model(ModelConfig(str(run_dir / "checkpoint-2"), device="cpu"))


def test_a_signal_is_in_the_status(tiny_dir, directory):
    run_dir = directory / "signal"
    given = [*settings(tiny_dir, run_dir), "--train.steps=400", "--eval.prompts=0", "--run.checkpoint_every=1"]
    with start(2, "srft", "train", *given, path=directory) as process:
        deadline = time.monotonic() + 200
        while not list(run_dir.glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    status = read_status(run_dir)
    assert (status["state"], status["reason"]) == ("interrupted", "a signal"), told
    assert status["resume"] == f"srft train --resume {run_dir}" and "srft: error: stopped by a signal" in told


def test_four_ranks_go_on_from_the_checkpoint_of_two(one, killed, directory):
    run_dir = directory / "four"
    shutil.copytree(killed[0], run_dir)
    ended = torchrun(4, "srft", "train", "--resume", str(run_dir), path=directory)
    assert ended.returncode == 0, ended.stderr
    assert "going on after step 2" in ended.stdout and "held-out reward" in ended.stdout.splitlines()[-1]
    same_steps(run_dir, one, STEPS)
    same_model(run_dir, one)
    assert [line["step"] for line in lines(run_dir / "previous-1" / "metrics.jsonl")] == [1, 2, 3]


def test_one_process_goes_on_from_the_checkpoint_of_two(one, killed, directory, monkeypatch):
    run_dir = directory / "two, then one"
    shutil.copytree(killed[0], run_dir)
    monkeypatch.syspath_prepend(str(directory))
    run(load(str(run_dir / "config.toml"), []), resumed=resumable(str(run_dir)))
    same_steps(run_dir, one, STEPS)
    same_model(run_dir, one)


def test_a_wrong_setting_is_told_once(directory, tiny_dir):
    ended = torchrun(2, "srft", "train", "--train.lr=-1", path=directory)
    told = [line for line in ended.stderr.splitlines() if "train.lr" in line]
    assert ended.returncode != 0 and told == ["srft: error: train.lr: expected at least 0, found -1.0"]


@pytest.fixture(scope="module")
def updates(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What an update computes in one process, and on each of two ranks."""
    out = tmp_path_factory.mktemp("updates") / "out.pt"
    ended = torchrun(2, "tests.srft.ranks.worker", str(out), path=ROOT)
    assert ended.returncode == 0, ended.stderr
    return measure(Ranks()), torch.load(out, weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_has_the_loss_gradients_and_update_of_one_process(updates, case):
    one, ranks = updates[0][case], [rank[case] for rank in updates[1]]
    assert one["microbatches"] % 2 == 1  # the last round has one that is there for its collectives alone
    assert [rank["microbatches"] for rank in ranks] == [one["microbatches"] // 2 + 1] * 2
    assert sum(rank["local rows"] for rank in ranks) == one["local rows"]
    for rank in ranks:
        numbers = [key for key, value in one.items() if isinstance(value, float)]
        assert {key: rank[key] for key in numbers} == pytest.approx({k: one[k] for k in numbers}, rel=1e-5, nan_ok=True)
        for what in ("gradients", "weights"):
            assert set(rank[what]) == set(one[what])
            for name, expected in one[what].items():
                assert (rank[what][name] - expected).norm() <= 1e-5 * expected.norm(), name
        assert rank["rollouts"] == one["rollouts"] and rank["released"] == 1
        assert list(rank["told"]) == list(one["told"])
        for name, expected in one["told"].items():  # what an engine with weights of its own gets
            ours = rank["told"][name]
            assert ours.dtype == expected.dtype and (ours - expected).norm() <= 1e-5 * expected.norm(), name
        for ours, theirs in zip(rank["statistics"], one["statistics"]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
