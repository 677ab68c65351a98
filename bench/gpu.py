"""`make gpu`: everything that a day with a GPU is for, within nine minutes, in one JSON and a short table.

    python -m bench.gpu [--device cuda|cpu] [--seconds 520] [--out FILE]

1. the tests of the loss head and of the bench's memory counts, on the device
2. launch settings of the row kernels, measured and put into the package's table (srft_kernels/rows/tuning.json), which
   everything after this uses; the kernels' exactness on rows of a real length under them
3. the bench, cases.py from the top until its share of the time is over
4. profiles of the fused loss and of scoring: the kernels that take the time

Needs torch, triton, transformers, pytest and pytest-benchmark, and no network. What found no time, or no package, is
listed as skipped. On a CPU it is a rehearsal of the same, on small shapes.

Each step is a process of its own with a time limit, and FILE is written after each of them and after every case: what
was measured stays, whatever comes later. A bench process that dies or hangs is followed by another one, which goes on
without the provider that was at work. Exit status 0: nothing of ours was wrong or failed, here or in a device test.

    --out FILE     default bench/results/<name of the GPU>.json; on a CPU .benchmarks/gpu-cpu.json
    $COMMIT        names the commit in it where there is no git repository to ask: `COMMIT=0123abc make gpu`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .needs import needs

if __name__ == "__main__":
    needs("make gpu", "torch", "triton", "pytest", "pytest_benchmark")

import torch

from srft_kernels.rows import tuning

from .environment import ROOT, environment
from .groups import check_group, every_case
from .measure import EVERYONE, Row
from .providers import OUR_NAMES, OURS
from .record import Record
from .table import HEADER
from .targets import evaluate
from .timing import LOST
from .tune import write

DEVICE_TESTS = (
    "tests/srft_kernels/test_on_device.py",
    "tests/srft_kernels/test_engine_cuda_graphs.py",
    "tests/bench/test_memory.py",
)
TUNED_TEST = "tests/srft_kernels/test_on_device.py::test_a_vocabulary_of_many_blocks"
TUNING = 45  # seconds for the launch settings
RESERVED = 40  # seconds that the profiles may need
STALLED = 120  # seconds of no news from the bench: it hangs
RESTARTS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    parser.add_argument("--group", default="", help="only these groups of the bench")
    parser.add_argument("--out", type=Path, help="the JSON")
    options = parser.parse_args(arguments)
    device = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device here; `make gpu DEVICE=cpu` rehearses without one", file=sys.stderr)
        return 2
    try:
        check_group(options.group, device)
    except ValueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + options.seconds

    def left(share: float = 1.0, keep: float = 0.0) -> float:
        return max(0.0, share * (deadline - keep - time.perf_counter()))

    record = Record((options.out or default_path(device)).absolute())
    record.write(machine_info=environment(device, command_of(device)), tests={}, profiles=[])
    print(f"1. tests of the loss head on {device}", flush=True)
    record.data["tests"][" ".join(DEVICE_TESTS)] = device_tests = pytest(DEVICE_TESTS, left(0.4))
    record.write()
    print(f"2. launch settings ({left():.0f} s left)", flush=True)
    record.data["tuning"], record.data["machine_info"]["launch_table"] = tune(device, min(TUNING, left(0.1)))
    record.data["tests"][TUNED_TEST] = tuned_test = pytest([TUNED_TEST], left(0.2))
    record.write()
    print(f"3. bench ({left():.0f} s left)", flush=True)
    bench(record, device, options.group, lambda: left(keep=RESERVED))
    print(f"4. profiles ({left():.0f} s left)", flush=True)
    profiles(record, device, options.group, left())
    print(summary(record.data))
    print(f"\n{record.data['seconds']:.0f} s; {record.path}")
    tested = device_tests["passed"] and tuned_test["passed"]
    return 0 if tested and record.data["benchmarks"] and not any(map(is_ours, problems(record.data))) else 1


def default_path(device: str) -> Path:
    if not device.startswith("cuda"):
        return ROOT / ".benchmarks" / "gpu-cpu.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}.json"


def command_of(device: str) -> str:
    return "make gpu" + ("" if device == "cuda" else f" DEVICE={device}")


def run(
    command: list[str], seconds: float, stalled: Callable[[], bool] = lambda: False, **variables: str
) -> tuple[int | None, str]:
    """(exit status, output) of a Python command; None where it was stopped for time, or because it `stalled`.

    It is stopped together with the processes that it started (compilers, say).
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as shown:
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=shown,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end, status = time.perf_counter() + max(seconds, 1), None
        try:
            while status is None and time.perf_counter() < end and not stalled():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(0.5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shown.seek(0)
        return status, shown.read()


def pytest(arguments: list[str] | tuple[str, ...], seconds: float, **variables: str) -> dict[str, Any]:
    """passed: True, False, or None where the time was over before the tests were; their last line; what failed."""
    if seconds < 5:
        return {"passed": None, "summary": "skipped: no time left", "failures": []}
    status, text = run(["-m", "pytest", *arguments, "--tb=short", "-p", "no:cacheprovider"], seconds, **variables)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    words = lines[-1].strip("= ") if lines else "no output"
    if status is None:
        words = f"stopped after {seconds:.0f} s, not finished: {words[:80]}"
    print("  " + words, *failures[:10], sep="\n  ", flush=True)
    return {"passed": None if status is None else status == 0, "summary": words, "failures": failures}


def bench(record: Record, device: str, group: str, left: Callable[[], float]) -> None:
    """Fill the record. What takes a process down is left out of the next one, until the time is over."""
    told = ""

    def stalled() -> bool:
        nonlocal told
        running = record.running
        if running and running["case"] != told:
            told = running["case"]
            print(f"  {told}", flush=True)
        return running is not None and time.time() - running["since"] > STALLED

    command = ["-m", "pytest", "bench/", "--benchmark", f"--device={device}", f"--group={group}"]
    problems = []
    for _ in range(1 + RESTARTS):
        if left() < 10:
            problems.append("no time left")
            break
        status, text = run(
            [*command, f"--budget={left():.0f}", f"--record={record.path}"], left() + RESERVED * 2 / 3, stalled
        )
        start = text.rfind("\n", 0, max(0, text.find(HEADER) - 1)) if HEADER in text else -6000
        print(text[start:].partition("= slowest")[0].rstrip(" ="), flush=True)
        record.read()
        if status is None and not stalled():
            problems.append("stopped for time")
            if record.running:
                record.blame("stopped for time", skipped=True)
            break
        if record.running:
            reason = "hung" if status is None else f"died, exit status {status}"
            problems.append(f"{record.blame(f'the process {reason}')}: the process {reason}; another one went on")
        elif status in (0, 1, 5):  # every case was looked at; 1: some of ours is wrong or failed; 5: there is no case
            break
        else:
            problems.append(f"exit status {status}: {text.strip()[-300:]}")
            if status != LOST:
                break
    if problems:
        record.data["problems"] = problems
    never = [case for case in every_case(device) if group in case.group and str(case) not in record.done]
    record.add(Row(case, EVERYONE, "skipped", "the bench ended before") for case in never)


def tune(device: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """(rows of the launch table measured here, the table that the bench uses): on a GPU the package's has them too.

    What was known when the time was over counts.
    """
    if seconds < 5:
        return [], "the package's"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.json"
        status, text = run(["-m", "bench.tune", "--device", device, "--seconds", f"{seconds:.0f}", "--out", str(path)],
                           seconds + 30)  # fmt: skip
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    before = tuning.table()
    rows = [row for row in rows if row["measured"] and row not in before]
    print(f"  {len(rows)} rows measured" if rows or status == 0 else text[-1500:], flush=True)
    if not rows or not device.startswith("cuda"):
        return rows, "the package's"
    try:
        write(rows, tuning.TABLE)
    except OSError as error:
        print(f"  the bench goes on with the table as it was: {error}", flush=True)
        return rows, f"the package's, which cannot be written: {error.strerror}"
    return rows, f"{len(rows)} rows measured in this run"


def profiles(record: Record, device: str, group: str, seconds: float) -> None:
    if seconds > 10:
        status, text = run(["-m", "bench.profiles", device, str(record.path), group], seconds)
        record.read()
        if status != 0:
            print(f"  stopped after {seconds:.0f} s" if status is None else text[-2000:], flush=True)
    else:
        print("  skipped: no time left", flush=True)


def problems(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are wrong or failed, ours first; one that stands for all providers concerns ours."""
    return sorted(
        (row for row in result["untimed"] if row["status"] in ("wrong", "failed")), key=lambda r: not is_ours(r)
    )


def is_ours(row: dict[str, Any]) -> bool:
    return row["provider"] in (*OUR_NAMES, EVERYONE)


def summary(result: dict[str, Any]) -> str:
    """Ours against the best peer of each case, targets, the largest kernels, the tests, and what was left out."""
    by_case: dict[str, dict[str, dict]] = {}
    for row in result["benchmarks"]:
        by_case.setdefault(row["extra_info"]["case"], {})[row["extra_info"]["provider"]] = row
    lines = ["", f"{'case':<66} {'ours ms':>9} {'× products':>10} {'best peer':>10}  who"]
    for case, rows in by_case.items():
        if (mine := rows.pop(OURS.name, None)) is None:
            continue
        peers = (row for name, row in rows.items() if name not in OUR_NAMES)
        best = min(peers, key=lambda row: row["stats"]["median"], default=None)
        times = mine["extra_info"].get("ratio_to_products")
        peer = (f"{1e3 * best['stats']['median']:.2f}", best["extra_info"]["provider"]) if best else ("–", "–")
        ratio = f"{times:.2f}" if times else "–"
        noisy = " (noisy)" if mine["extra_info"].get("noisy") or (best and best["extra_info"].get("noisy")) else ""
        lines.append(f"{case:<66} {1e3 * mine['stats']['median']:>9.2f} {ratio:>10} {peer[0]:>10}  {peer[1]}{noisy}")
    if result.get("machine_info", {}).get("kind") == "cuda":
        lines += ["", *(f"{verdict:<15} {what}: {goal}; {found}" for what, goal, found, verdict in evaluate(result))]
    for shown in result.get("profiles", []):
        lines += ["", f"profile of {shown['case']}" + (f": {shown['problem']}" if "problem" in shown else "")]
        lines += [f"  {k['milliseconds']:9.2f} ms {k['share']:5.0%} {k['calls']:4}× {k['name'][:80]}"
                  for k in shown["kernels"][:6]]  # fmt: skip
    lines.append("")
    for name, tests in result.get("tests", {}).items():
        lines += [f"{name}: {tests['summary']}", *(f"  {failure}" for failure in tests["failures"][:10])]
    lines += [f"the bench: {problem}" for problem in result.get("problems", [])]
    found = problems(result)
    if found:
        lines += ["", "wrong or failed:"]
        lines += [f"  {row['status'].upper()} {row['provider']}, {row['case']}: {row['reason']}"[:300] for row in found]
    absent = dict.fromkeys((r["provider"], r["reason"]) for r in result["untimed"] if r["status"] == "unavailable")
    lines += ["", *(f"not measured: {who}: {why}" for who, why in absent)]
    skipped: dict[str, dict[str, None]] = {}  # by reason
    for row in result["untimed"]:
        if row["status"] == "skipped":
            who = "" if row["provider"] == EVERYONE else f"{row['provider']}, "
            skipped.setdefault(row["reason"], {})[f"  {who}{row['case']}"] = None
    for reason, cases in skipped.items():
        lines += [f"skipped, {reason}:", *cases]
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `run` stops what it has started
    sys.exit(main())
