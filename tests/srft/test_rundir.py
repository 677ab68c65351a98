import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srft.config import RunConfig
from srft.errors import UserError
from srft.rundir import RunLog, create_run_dir, hold, let_go, read_jsonl, read_status, rewind_run_dir, write_status


def create(config) -> Path:
    path = create_run_dir(config)
    let_go(path)
    return path


def rewind(path, *arguments) -> None:
    rewind_run_dir(path, *arguments)
    let_go(path)


def test_time_in_the_name_makes_a_new_directory_every_time(tmp_path):
    config = RunConfig(dir=str(tmp_path / "runs" / "{time}"))
    made = {create(config) for _ in range(3)}
    assert len(made) == 3 and all(path.is_dir() and path.parent == tmp_path / "runs" for path in made)


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"run\.dir.*not empty"):
        create(RunConfig(dir=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    assert create(RunConfig(dir=str(tmp_path / "empty"))) == tmp_path / "empty"
    with pytest.raises(UserError, match="is a file"):
        create(RunConfig(dir=str(tmp_path / "mine.txt")))


def test_a_directory_that_cannot_be_written_into_is_refused(tmp_path, monkeypatch):
    def read_only(dir, **_):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)  # as chmod would, were the tests not run by root
    with pytest.raises(UserError, match=r"run\.dir: cannot write into .*: Permission denied; name another directory"):
        create(RunConfig(dir=str(tmp_path)))


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert create(RunConfig(dir="~/runs/one")) == tmp_path / "runs" / "one"
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]


def test_overwriting_moves_the_earlier_run_aside_and_touches_nothing_else(tmp_path):
    config = RunConfig(dir=str(tmp_path), overwrite=True)
    (tmp_path / "mine.txt").write_text("precious")
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"run {number}")
        write_status(tmp_path, "finished", 1, 1)
        (tmp_path / "final").mkdir()
        (tmp_path / "interrupted-3").mkdir()
        create(config)
        assert (tmp_path / f"previous-{number}" / "metrics.jsonl").read_text() == f"run {number}"
        assert (tmp_path / f"previous-{number}" / "final").is_dir()
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert {each.name for each in tmp_path.iterdir()} == {"mine.txt", "previous-1", "previous-2"}


def test_a_run_directory_goes_back_to_a_step_and_loses_nothing(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics({"step": step, "loss": math.nan})
        log.samples([{"step": step, "completion": "π\u2028"}] * 2)
        (tmp_path / f"checkpoint-{step}").mkdir()
    log.evaluation(0, type("Evaluation", (), {"as_dict": lambda self: {"reward": 0.5}})())
    (tmp_path / "final").mkdir(), (tmp_path / "checkpoint-best").mkdir()
    everything = {each.name: each.read_bytes() for each in tmp_path.glob("*.jsonl")}
    (tmp_path / "config.toml").write_text("old")
    rewind(tmp_path, 2, "new")
    for name, per_step in (("metrics.jsonl", 1), ("samples.jsonl", 2)):
        assert (tmp_path / name).read_bytes() == b"".join(everything[name].splitlines(keepends=True)[: 2 * per_step])
        assert (tmp_path / "previous-1" / name).read_bytes() == everything[name]
    assert (tmp_path / "evaluation.jsonl").read_bytes() == everything["evaluation.jsonl"]
    assert {each.name for each in tmp_path.glob("check*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-best"}
    moved = {"config.toml", "metrics.jsonl", "samples.jsonl", "checkpoint-3", "final"}
    assert {each.name for each in (tmp_path / "previous-1").iterdir()} == moved
    (tmp_path / "config.toml").write_text("new")
    rewind(tmp_path, 2, "new")
    assert not (tmp_path / "previous-2").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut off as its process was killed
    rewind(tmp_path, 2, "new")
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n") and (tmp_path / "previous-2").is_dir()


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    log = RunLog(tmp_path)
    log.metrics({"step": 1, "loss": 0.5, "clip_fraction": math.nan})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "clip_fraction": None}
    log.samples([{"completion": "π\n####"}, {"completion": ""}])
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"completion": "π\n####"}, {"completion": ""}]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_broken_line_does_not_cost_the_others(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1}\n{"te\n{"step": 2}\n{"text": "π'.encode()[:-1])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_row_ends_at_a_newline_only(tmp_path):
    rows = [{"completion": f"a{end}b"} for end in ("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r\n")]
    RunLog(tmp_path).samples(rows)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        RunLog(tmp_path).metrics({"step": 1})
    (tmp_path / ".status.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*status\.json'"):
        write_status(tmp_path, "running", 0, 1)


def test_the_status_is_the_last_one(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 0, 2)
    write_status(tmp_path, "failed", 1, 2, "π\nboom")
    found = read_status(tmp_path)
    assert found == {"state": "failed", "step": 1, "steps": 2, "reason": "π\nboom", "resume": ""}
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]


def test_a_run_that_was_stopped_before_it_had_anything_does_not_block_the_next(tmp_path):
    config = RunConfig(dir=str(tmp_path / "run"))
    for number, state in enumerate(("failed", "running"), start=1):  # the second was killed, else it would hold it
        path = create(config)
        (path / "config.toml").write_text("")
        write_status(path, state, 0, 5)
        create(config)
        assert read_status(path / f"previous-{number}")["state"] == state
    (path / "config.toml").write_text("")
    write_status(path, "failed", 0, 5)
    (path / "evaluation.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"run\.dir.*not empty"):
        create(config)


def test_a_directory_that_is_no_run_is_not_moved(tmp_path):
    for name in ("train.jsonl", "metrics.jsonl", "config.toml"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match=r"run\.dir: .* is not the directory of a run \(neither status.json"):
        create(RunConfig(dir=str(tmp_path), overwrite=True))
    write_status(tmp_path, "finished", 1, 1)
    create(RunConfig(dir=str(tmp_path), overwrite=True))
    assert (tmp_path / "train.jsonl").read_text() == "mine"  # no run writes a file of this name
    with pytest.raises(UserError, match=r"run\.dir: expected the name of a directory, found none"):
        create(RunConfig(dir=""))


def test_one_process_at_a_time_writes_into_a_directory(tmp_path):
    config = RunConfig(dir=str(tmp_path / "run"))
    program = (
        "import os, time; from srft.config import RunConfig; from srft.rundir import create_run_dir\n"
        f"create_run_dir(RunConfig(dir={config.dir!r}))\n"
        "if not os.fork():\n"  # as a reward may, in a process that lives on
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        child = int(other.stdout.readline())
        for attempt in (lambda: create_run_dir(config), lambda: rewind_run_dir(tmp_path / "run", 0, "")):
            with pytest.raises(UserError, match="another process is writing its run there"):
                attempt()
        other.kill()
        other.wait()
        create_run_dir(config)
        os.kill(child, 9)
    with pytest.raises(UserError, match="this process is writing a run there already"):
        create_run_dir(config)
    let_go(tmp_path / "run")


def test_a_lock_that_a_forked_process_has_too_is_let_go(tmp_path):
    hold(tmp_path)
    if not (child := os.fork()):
        time.sleep(60)
        os._exit(0)
    let_go(tmp_path)
    program = f"from pathlib import Path; from srft.rundir import hold; hold(Path({str(tmp_path)!r}))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_directory_that_was_refused_is_not_held(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"run\.dir"):
            create_run_dir(RunConfig(dir=str(tmp_path), overwrite=overwrite))
    hold(tmp_path)
    let_go(tmp_path)


def test_two_runs_that_start_together_have_two_directories(tmp_path):
    config = RunConfig(dir=str(tmp_path / "{time}"))
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: create(config), range(40)))
    assert len(set(made)) == 40


@pytest.mark.parametrize("point", ["copy2", "rename", "write_text"])
def test_a_rewind_that_is_broken_off_loses_nothing(tmp_path, monkeypatch, point):
    class Killed(BaseException):
        pass

    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics({"step": step})
    (tmp_path / "config.toml").write_text("old")
    (tmp_path / "final").mkdir()
    owner = shutil if point == "copy2" else type(tmp_path)
    original = getattr(owner, point)
    for fatal in range(9):
        calls = iter(range(fatal))

        def failing(*args, calls=calls, **options):
            if next(calls, None) is None:
                raise Killed
            return original(*args, **options)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, point, failing)
            rewind(tmp_path, 2, "new")
    rewind(tmp_path, 2, "new")
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "config.toml").read_text() == "old" and not (tmp_path / "final").exists()
    kept = [read_jsonl(each) for each in sorted(tmp_path.glob("previous-*/metrics.jsonl"))]
    assert any([row["step"] for row in rows] == [1, 2, 3] for rows in kept)
