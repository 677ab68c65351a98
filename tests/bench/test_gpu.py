"""`make gpu DEVICE=cpu`: the rehearsal of a day with a GPU, on one small group; and days on which things go wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.cases import Case, Shape
from bench.measure import EVERYONE, Row
from bench.providers import OUR_NAMES
from bench.record import Record, replace, timed, untimed
from bench.timing import LOST
from srft_kernels.rows import tuning

CASE = Case("scoring", "scoring", Shape(64, 16, 128))


@pytest.mark.slow
def test_rehearsal(tmp_path, capfd, monkeypatch):
    assert all((gpu.ROOT / path).exists() for path in gpu.DEVICE_TESTS)  # they run in this session anyway
    monkeypatch.setattr(gpu, "DEVICE_TESTS", ("tests/srft_kernels/test_checks.py",))
    monkeypatch.setattr(gpu, "TUNED_TEST", f"{gpu.DEVICE_TESTS[0]}::test_other_classes_of_tensors_are_taken")
    monkeypatch.setattr(gpu, "TUNING", 6)  # of one kernel: all of them are in test_tuning.py
    out = tmp_path / "gpu.json"  # the time is more than a slow machine takes
    status = gpu.main(["--device", "cpu", "--group", "1 M", "--seconds", "600", "--out", str(out)])
    text = capfd.readouterr().out
    assert status == 0, text
    assert "rows measured" in text
    data = json.loads(out.read_text(encoding="utf-8"))
    assert {row["group"] for row in data["benchmarks"]} == {"1 M tokens"}
    row = next(row for row in data["benchmarks"] if row["extra_info"]["provider"] == "srft_kernels")
    assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 3 and row["stats"]["median"] > 0
    assert {"tflops", "ratio_to_products", "peak_bytes", "error", "noisy"} <= set(row["extra_info"])
    machine = data["machine_info"]
    assert {"device", "driver", "packages", "commit"} <= set(machine) and "node" not in machine
    assert machine["command"] == "make gpu DEVICE=cpu"
    assert machine["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # of a CUDA build
    assert [bool(p["kernels"]) for p in data["profiles"]] == [True, True] and 0 < data["seconds"] < 620
    assert machine["launch_table"] == "the package's"
    assert len(data["tests"]) == 2 and all(tests["passed"] for tests in data["tests"].values())
    assert not (tmp_path / "gpu.running").exists()
    assert "best peer" in text and "profile of" in text and "scaled down" in text


def test_no_time_is_told_as_skipped(tmp_path, capfd):
    assert gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "out.json")]) == 1
    text = capfd.readouterr().out
    assert "skipped: no time left" in text and "the bench: no time left" in text
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["seconds"] < 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_to_do(capsys):
    assert gpu.main(["--device", "cuda"]) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err


def test_a_group_that_there_is_not_is_refused_before_anything_runs(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--group", "shardd", "--out", str(tmp_path / "out.json")]) == 2
    shown = capsys.readouterr()
    assert "sharded" in shown.err and not shown.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu", "tune"])
def test_a_python_without_torch_is_told_which_one_to_name(name):
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-m", f"bench.{name}"]  # -S: nothing but the standard library
    done = subprocess.run(command, cwd=gpu.ROOT, env=bare, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"make {name}: ") and "no torch, triton" in line
    assert f"make {name} PYTHON=" in line


def test_what_is_stopped_takes_its_children_along():
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); {child}"
    )
    started = time.perf_counter()
    status, text = gpu.run(["-c", parent], 2)
    assert status is None and time.perf_counter() - started < 20
    for _ in range(100):
        if not alive(int(text)):
            break
        time.sleep(0.1)
    assert not alive(int(text))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as state:
            return state.read().split(") ")[1][0] != "Z"  # a zombie has ended; nobody has asked yet
    except FileNotFoundError:
        return False


def test_what_hangs_is_stopped_before_its_time():
    started = time.perf_counter()
    assert gpu.run(["-c", "import time; time.sleep(60)"], 60, stalled=lambda: True)[0] is None
    assert time.perf_counter() - started < 20


CASES = [Case("scoring", "scoring", Shape(n, 16, 128)) for n in (32, 64)]
ROWS = [Row(case, "srft_kernels", "ok", seconds=[0.1], extra={"case": str(case)}) for case in CASES]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """gpu.bench with processes that are pretended: each does something with the record and ends with a status."""

    def bench(*processes):
        left = list(processes)

        def pretend(command, seconds, stalled, **variables):
            path = next(word for word in command if word.startswith("--record=")).partition("=")[2]
            return left.pop(0)(Record(Path(path), resume=True)), "output of the process"

        monkeypatch.setattr(gpu, "run", pretend)
        monkeypatch.setattr(gpu, "every_case", lambda device: CASES)
        record = Record(tmp_path / "run.json")
        record.write(machine_info={})
        gpu.bench(record, "cpu", "", lambda: 100.0)
        saved = Record(record.path, resume=True)
        assert saved.running is None
        return saved, left

    return bench


def first_case(record):
    record.add(ROWS[:1])
    record.begin(CASES[1], "QuACK")


def dies(record):
    first_case(record)
    return -11


def loses_the_context(record):
    first_case(record)
    record.blame("an illegal memory access")
    return LOST


def hangs(record):
    first_case(record)
    replace(record.mark, json.dumps(record.running | {"since": time.time() - gpu.STALLED - 1}))
    return None


def runs_out_of_time(record):
    first_case(record)
    return None


def the_rest(record):
    assert "QuACK" in record.left_out and record.done == {str(CASES[0])}
    record.add(ROWS[1:])
    return 0


@pytest.mark.parametrize(
    "process, told", [(dies, "died, exit status -11"), (loses_the_context, "an illegal"), (hangs, "hung")]
)
def test_after_a_process_that_dies_or_hangs_another_goes_on_without_the_culprit(run, process, told):
    saved, left = run(process, the_rest)
    assert not left and len(saved.data["benchmarks"]) == 2
    assert told in saved.left_out["QuACK"] and len(saved.data["problems"]) == 1


def test_processes_that_keep_dying_come_to_an_end(run):
    def dies_again(record):
        record.begin(CASES[0], f"peer {len(record.left_out)}")
        return -6

    saved, left = run(*[dies_again] * 20)
    assert len(saved.left_out) == gpu.RESTARTS + 1 == 20 - len(left)
    assert {row["case"]: row["status"] for row in saved.data["untimed"]} == dict.fromkeys(map(str, CASES), "skipped")


def test_a_bench_stopped_for_time_keeps_its_rows_and_blames_nobody(run):
    saved, left = run(runs_out_of_time, the_rest)
    assert len(left) == 1 and len(saved.data["benchmarks"]) == 1 and not saved.left_out
    assert [(row["status"], row["reason"]) for row in saved.data["untimed"]] == [("skipped", "stopped for time")]
    saved, left = run(lambda record: None, the_rest)  # before it had begun with anything
    assert len(left) == 1 and saved.data["problems"] == ["stopped for time"]


def test_a_bench_that_cannot_start_is_tried_once(run):
    saved, left = run(lambda record: 4, the_rest)
    (problem,) = saved.data["problems"]
    assert len(left) == 1 and problem == "exit status 4: output of the process"


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """gpu.tune on a GPU where the tuner, which is pretended, is stopped after its first row; the package's table."""
    package = tmp_path / "package"
    package.mkdir()
    rule = {"kernel": "*", "target": "*", "vocab": None, "block": 64, "warps": 1, "programs": None, "measured": None}
    before = rule | {"target": "sm_80", "vocab": 1024, "measured": {"device": "another"}}
    table = package / "tuning.json"
    table.write_text(json.dumps([before, rule]), encoding="utf-8")
    monkeypatch.setattr(tuning, "TABLE", table)
    tuning.reload()
    row = before | {"target": "sm_90"}

    def stopped(command, seconds):
        out = Path(command[command.index("--out") + 1])
        out.write_text(json.dumps([before, row, rule]), encoding="utf-8")
        return None, "stopped"

    monkeypatch.setattr(gpu, "run", stopped)
    yield lambda: gpu.tune("cuda", 30), table, row
    monkeypatch.undo()
    tuning.reload()


def test_what_a_stopped_tuner_knew_is_in_the_table_of_the_rest_of_the_run(tuned):
    tune, table, row = tuned
    assert tune() == ([row], "1 rows measured in this run")
    assert [r["target"] for r in json.loads(table.read_text(encoding="utf-8"))] == ["sm_80", "sm_90", "*"]


def test_a_package_that_cannot_be_written_is_told_and_no_end(tuned, monkeypatch, capfd):
    tune, table, row = tuned
    before = table.read_text(encoding="utf-8")

    def refused(rows, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(gpu, "write", refused)
    assert tune() == ([row], "the package's, which cannot be written: Permission denied")
    assert table.read_text(encoding="utf-8") == before
    assert "goes on with the table as it was" in capfd.readouterr().out


def rows(*found: Row) -> dict:
    return {"benchmarks": [], "untimed": [untimed(row) for row in found]}


def test_wrong_and_failed_rows_are_shown_ours_first():
    text = gpu.summary(
        rows(
            Row(CASE, "QuACK", "failed", "LeftOut: hung"),
            Row(CASE, "eager", "unavailable", "not here"),
            Row(CASE, "torch.compile", "skipped", "more than 30 s"),
            Row(CASE, "srft_kernels", "wrong", "error dx 0.5 (allowed 0.1)"),
        )
    )
    shown = text.splitlines()
    ours = next(i for i, line in enumerate(shown) if "WRONG srft_kernels" in line)
    assert str(CASE) in shown[ours] and "dx 0.5" in shown[ours] and "FAILED QuACK" in shown[ours + 1]
    assert "not measured: eager: not here" in text and f"skipped, more than 30 s:\n  torch.compile, {CASE}" in text


def test_the_best_peer_is_none_of_ours():
    case = {"case": str(CASE)}
    times = {"srft_kernels": 0.2, "srft_kernels, filtered": 0.1, "one process": 0.1, "verl": 0.4, "eager": 0.3}
    measured = [timed(Row(CASE, name, "ok", seconds=[each], extra=case)) for name, each in times.items()]
    line = next(line for line in gpu.summary({"benchmarks": measured, "untimed": []}).splitlines() if str(CASE) in line)
    assert line.split()[-4:] == ["200.00", "–", "300.00", "eager"]


@pytest.mark.parametrize(
    "row, device_tests, status",
    [
        (None, True, 0),
        (Row(CASE, "QuACK", "failed", "broken"), True, 0),
        *((Row(CASE, name, "wrong", "error"), True, 1) for name in OUR_NAMES),
        (Row(CASE, EVERYONE, "failed", "truth in fp64: out of memory"), True, 1),
        (None, False, 1),
        (None, None, 1),
    ],
)
def test_the_exit_status_says_whether_ours_is_right(tmp_path, monkeypatch, row, device_tests, status):
    def bench(record, *_):
        record.add([Row(CASE, "srft_kernels", "ok", seconds=[0.1], extra={"case": str(CASE)}), *([row] if row else [])])

    monkeypatch.setattr(gpu, "bench", bench)
    monkeypatch.setattr(gpu, "tune", lambda *_: ([], "the package's"))
    monkeypatch.setattr(gpu, "profiles", lambda *_: None)
    found = {"passed": device_tests, "summary": "", "failures": []}
    monkeypatch.setattr(gpu, "pytest", lambda *_, **__: found)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out.json")]) == status
