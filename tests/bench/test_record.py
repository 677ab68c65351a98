"""What is written: whole files, plain JSON, and `pytest bench/` around it."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import environment, test_bench
from bench.cases import Case, Shape
from bench.environment import ROOT
from bench.measure import Row
from bench.providers import OUR_NAMES
from bench.record import Record, finite

CASE = Case("scoring", "scoring", Shape(64, 16, 128))


def test_no_number_is_infinite_or_nan(tmp_path):
    record = Record(tmp_path / "run.json")
    noisy = Row(
        CASE, "a", "ok", seconds=[0.5], extra={"case": str(CASE), "uncertainty": math.inf, "errors": {"dx": math.nan}}
    )
    record.add([noisy, Row(CASE, "b", "wrong", "unknown", extra={"error": math.inf})])

    def refuse(word):
        raise AssertionError(word)

    data = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["benchmarks"][0]["extra_info"]["uncertainty"] is None and data["untimed"][0]["error"] is None
    assert data["benchmarks"][0]["stats"]["median"] == 0.5 and data["benchmarks"][0]["stats"]["data"] == [0.5]
    assert finite({"a": [1.0, -math.inf], "b": (math.nan, "x", None, 3)}) == {
        "a": [1.0, None],
        "b": [None, "x", None, 3],
    }


def test_a_write_that_is_interrupted_leaves_the_file_before(tmp_path, monkeypatch):
    record = Record(tmp_path / "run.json")
    record.write(tests={})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.record.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write(tests={"a": 1})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["tests"] == {}


def test_the_commit_is_dirty_by_code_and_not_by_results(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *command], check=True)

    git("init", "--quiet")
    for path in ("bench/results/a.json", "bench/a.py", "srft/a.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1", encoding="utf-8")
    git("add", ".")
    git("commit", "--quiet", "-m", "m")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    clean = environment.commit()
    (tmp_path / "bench/results/a.json").write_text("2", encoding="utf-8")
    assert environment.commit() == clean and len(clean) == 12
    (tmp_path / "bench/a.py").write_text("2", encoding="utf-8")
    assert environment.commit() == clean + "+"


def test_without_a_repository_or_a_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
    monkeypatch.setattr(environment, "output", lambda *_: "")
    assert environment.driver() == "unknown"


def test_the_command_leaves_its_file_and_says_how_long_it_took(tmp_path):
    done = pytest_bench(tmp_path, "--group=cost against V", "-k", "4096")
    assert done.returncode == 0, done.stdout
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["extra_info"]["provider"] for row in data["benchmarks"]] == ["srft_kernels", "eager"]
    assert data["untimed"] == [] and 0 < data["seconds"] < 100 and not (tmp_path / "out.running").exists()
    assert "cost against V" in done.stdout and "every round, as JSON" in done.stdout


def test_a_selection_without_a_case_is_no_error(tmp_path):
    done = pytest_bench(tmp_path, "-k", "nothing")
    assert done.returncode == 5 and "Error" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_group_that_there_is_not_is_refused_with_those_there_are(tmp_path):
    done = pytest_bench(tmp_path, "--group=shardd")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and not list(tmp_path.iterdir())
    assert "'shardd'" in done.stderr and "sharded" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("provider", OUR_NAMES)
def test_a_wrong_row_of_ours_fails_the_bench_and_a_peers_does_not(provider):
    rows = {name: Row(CASE, name, "wrong", "error dx 0.5") for name in (provider, "a peer")}
    bench = SimpleNamespace(before=set(), row=lambda case, name: rows[name])
    benchmark = SimpleNamespace()
    with pytest.raises(AssertionError, match=r"wrong: error dx 0\.5"):
        test_bench.test_case(benchmark, bench, CASE, provider)
    with pytest.raises(pytest.skip.Exception):
        test_bench.test_case(benchmark, bench, CASE, "a peer")


def pytest_bench(tmp_path, *options):
    command = ["-m", "pytest", "bench/", "--benchmark", "--device=cpu", f"--benchmark-json={tmp_path / 'out.json'}"]
    return subprocess.run([sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
