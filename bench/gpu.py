"""`make gpu`: everything that a day with a GPU is for, within nine minutes, in one JSON and a short table.

    python -m bench.gpu [--device cuda|cpu] [--seconds 520] [--out FILE]

1. the tests of the loss head on the device
2. the bench, cases.py from the top until its share of the time is over
3. profiles of the fused loss and of scoring: the kernels that take the time
4. with what time is left, the other tests of srft_kernels, in Triton's interpreter

Needs torch, triton, transformers, pytest and pytest-benchmark, and no network. What found no time, or no package, is
listed as skipped. On a CPU it is a rehearsal of the same, on small shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .cases import TASKS, Case, Shape, cases
from .environment import ROOT
from .inputs import make
from .measure import default_dtype
from .providers import OURS

DEVICE_TESTS = "tests/srft_kernels/test_on_device.py"
OTHER_TESTS = "tests/srft_kernels"
RESERVED = 45  # seconds that the steps after the bench may need
PROFILED = (("full loss", "srft"), ("scoring", "scoring"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    parser.add_argument("--group", default="", help="only these groups of the bench")
    parser.add_argument(
        "--out", type=Path, help="default: bench/results/DEVICE.json; on a CPU .benchmarks/gpu-cpu.json"
    )
    options = parser.parse_args(arguments)
    device = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device here; `make gpu DEVICE=cpu` rehearses without one", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + options.seconds

    def left(share: float = 1.0, keep: float = 0.0) -> float:
        return max(0.0, share * (deadline - keep - time.perf_counter()))

    print(f"1. tests of the loss head on {device}", flush=True)
    tests = {DEVICE_TESTS: pytest([DEVICE_TESTS], left(0.35))}
    print(f"2. bench ({left():.0f} s left)", flush=True)
    result = bench(device, options.group, left(keep=RESERVED), left(keep=RESERVED / 2))
    print(f"3. profiles ({left():.0f} s left)", flush=True)
    result["profiles"] = [profile(group, task, device, options.group) for group, task in PROFILED if left() > 5]
    print(f"4. other tests ({left():.0f} s left)", flush=True)
    tests[OTHER_TESTS] = pytest([OTHER_TESTS, f"--ignore={DEVICE_TESTS}"], left(), TRITON_INTERPRET="1")
    result["tests"] = tests
    out = options.out or default_path(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(summary(result))
    print(f"\n{out}")
    return 0 if tests[DEVICE_TESTS]["passed"] and result["benchmarks"] else 1


def default_path(device: str) -> Path:
    if not device.startswith("cuda"):
        return ROOT / ".benchmarks" / "gpu-cpu.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}.json"


def run(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """(exit status, output); None where it was stopped for time."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(seconds, 1),
        )
    except subprocess.TimeoutExpired as late:
        shown = late.stdout or b""
        return None, shown.decode(errors="replace") if isinstance(shown, bytes) else shown
    return done.returncode, done.stdout


def pytest(arguments: list[str], seconds: float, **variables: str) -> dict[str, Any]:
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


def bench(device: str, group: str, budget: float, most: float) -> dict[str, Any]:
    """pytest-benchmark's JSON of bench/, or an empty one that says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        options = ["--benchmark", f"--device={device}", f"--budget={budget:.0f}", f"--group={group}"]
        status, text = run(["-m", "pytest", "bench/", *options, f"--benchmark-json={path}"], most + RESERVED / 2)
        print(text[text.find("full loss:") :] if "full loss:" in text else text[-6000:], flush=True)
        if path.exists() and path.stat().st_size:
            result = json.loads(path.read_text(encoding="utf-8"))
        else:
            reason = "stopped for time" if status is None else f"exit status {status}"
            result = {"benchmarks": [], "untimed": [], "machine_info": {}, "problem": f"{reason}\n{text[-3000:]}"}
    result["machine_info"]["command"] = "make gpu" + ("" if device == "cuda" else f" DEVICE={device}")
    return result


def profile(group: str, task: str, device: str, only: str) -> dict[str, Any]:
    """Time per kernel (on a CPU: operator) of one call of ours, largest first, from torch.profiler."""
    from torch.profiler import ProfilerActivity

    cuda = device.startswith("cuda")
    case = next(case for case in cases(device) if case.task == task)
    if only and only not in group:  # a rehearsal of one group
        case = Case(group, task, Shape(128, 64, 2048))
    found: dict[str, Any] = {"case": str(case), "products": TASKS[task].products, "kernels": []}
    try:
        inputs = make(case, device, default_dtype(device))
        call = OURS.load(device).call(task)
        call(inputs)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as recorded:
            call(inputs)
            if cuda:
                torch.cuda.synchronize()
        attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = [event for event in recorded.key_averages() if not cuda or str(event.device_type).endswith("CUDA")]
        events.sort(key=lambda event: -getattr(event, attribute))
        total = sum(getattr(event, attribute) for event in events) or 1
        found["kernels"] = [
            {
                "name": event.key,
                "calls": event.count,
                "milliseconds": getattr(event, attribute) / 1e3,
                "share": getattr(event, attribute) / total,
            }
            for event in events[:12]
        ]
    except Exception as error:  # a profile is worth less than what was measured before it
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def summary(result: dict[str, Any]) -> str:
    """Ours against the best peer of each case, the largest kernels, the tests, and what was left out."""
    by_case: dict[str, dict[str, dict]] = {}
    for row in result["benchmarks"]:
        by_case.setdefault(row["extra_info"]["case"], {})[row["extra_info"]["provider"]] = row
    lines = ["", f"{'case':<66} {'ours ms':>9} {'× products':>10} {'best peer':>10}  who"]
    for case, rows in by_case.items():
        if (mine := rows.pop("srft_kernels", None)) is None:
            continue
        best = min(rows.values(), key=lambda row: row["stats"]["median"], default=None)
        times = mine["extra_info"].get("ratio_to_products")
        peer = (f"{1e3 * best['stats']['median']:.2f}", best["extra_info"]["provider"]) if best else ("–", "–")
        ratio = f"{times:.2f}" if times else "–"
        lines.append(f"{case:<66} {1e3 * mine['stats']['median']:>9.2f} {ratio:>10} {peer[0]:>10}  {peer[1]}")
    for shown in result.get("profiles", []):
        lines += ["", f"profile of {shown['case']}" + (f": {shown['problem']}" if "problem" in shown else "")]
        lines += [f"  {k['milliseconds']:9.2f} ms {k['share']:5.0%} {k['calls']:4}× {k['name'][:80]}"
                  for k in shown["kernels"][:6]]  # fmt: skip
    lines += ["", *(f"{name}: {tests['summary']}" for name, tests in result.get("tests", {}).items())]
    if "problem" in result:
        lines += ["", f"the bench left no JSON: {result['problem']}"]
    absent = dict.fromkeys((row["provider"], row["status"], row["reason"]) for row in result["untimed"])
    skipped = [row["case"] for row in result["untimed"] if row["status"] == "skipped"]
    lines += [f"not measured: {who}: {status}: {why}" for who, status, why in absent if status != "skipped"]
    lines += [f"skipped: {case}" for case in dict.fromkeys(skipped)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
