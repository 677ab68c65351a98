"""`make tune`: measure launch settings of the row kernels on this device and put the best into the package's table.

    python -m bench.tune [--device cuda|cpu] [--seconds 60] [--out FILE]

From another program: `tune(device, seconds)`, which returns what it measured and writes nothing.

Each kernel runs on one chunk of logits of each vocabulary (most important first) with each candidate: first all of them
with fewer programs that walk over rows, then, with the best number of these, with other blocks and warps. The table is
written after every kernel and vocabulary: who stops this keeps what is known. The kernels overwrite their logits, so a
fresh copy is made before every call, outside the clock. A candidate whose results are not those of the table's settings
is refused, and one replaces them only where it is GAIN faster. On a CPU this is a rehearsal in Triton's interpreter on
small rows; its times mean nothing, and it writes no table unless --out names one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .needs import needs

if __name__ == "__main__":
    needs("make tune", "torch", "triton")

import torch
from torch import Tensor

import srft_kernels as sk
from srft_kernels.head import Head, aligned_size
from srft_kernels.rows import tuning

from . import record
from .environment import environment
from .timing import kind_of
from .timing import seconds as timed

VOCABS = {"cuda": (151_936, 32_000, 128_256, 65_536), "cpu": (96, 24)}
CHUNK = {"cuda": 2**30, "cpu": 2**10}  # bytes of logits: the default plan's, and a rehearsal's
BLOCKS = {"cuda": (8192, 4096, 16384, 2048), "cpu": (32, 16)}
WARPS = {"cuda": (16, 8, 32, 4), "cpu": (1, 2)}
PROGRAMS = (0.5, 0.75, 1, 2)  # per multiprocessor: rows in flight, some of which the L2 may hold
PER_THREAD = (8, 32)  # numbers per thread and step: from two 16-byte loads in flight to what registers hold
ROUNDS = {"cuda": 9, "cpu": 1}
GAIN = 0.02  # faster by less is noise
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest number


def tune(
    device: str,
    seconds: float,
    dtype: torch.dtype | None = None,
    each: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """{"rows": of the table, "timings": of every candidate, "skipped": for want of time, "environment"}.

    each: told what is known so far, whenever that is more than before.
    """
    kind = kind_of(device)
    dtype = dtype or (torch.bfloat16 if kind == "cuda" else torch.float32)
    deadline = time.perf_counter() + seconds
    found: dict[str, Any] = {"environment": environment(device, "make tune"), "rows": [], "timings": [], "skipped": []}
    known: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for stage in ("programs", "blocks and warps"):
        for vocab in VOCABS[kind]:
            for kernel in reversed(tuning.KERNELS):
                before = known.setdefault((kernel, vocab), [])
                timings, complete = measure(kernel, vocab, device, dtype, deadline, before)
                if not complete:
                    found["skipped"].append(f"{kernel} {vocab}: {stage}" + ", the later ones" * bool(timings))
                before += timings
                found["timings"] += timings
                rows = (best(of_kernel, found["environment"]) for of_kernel in known.values())
                found["rows"] = [row for row in rows if row is not None]
                each(found)
    return found


def candidates(usual: tuning.Launch, before: list[dict[str, Any]], kind: str) -> list[tuning.Launch]:
    """At first the other order and fewer programs than rows, which takes little to compile, then blocks and warps with
    the best of these."""
    if not before:
        fewer = [replace(usual, programs=programs) for programs in PROGRAMS]
        return [replace(usual, backward=not usual.backward), *fewer]
    best = min(before, key=lambda timing: timing.get("seconds", float("inf")))
    low, high = PER_THREAD
    warp = 64 if torch.version.hip else 32 if kind == "cuda" else 1
    return [
        tuning.Launch(block, warps, best["programs"], best["backward"])
        for block in BLOCKS[kind]
        for warps in WARPS[kind]
        if low <= block / (warps * warp) <= high and warps * warp <= 1024
    ]


def measure(
    kernel: str, vocab: int, device: str, dtype: torch.dtype, deadline: float, before: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    """(a timing per candidate, the table's settings first; whether time was left for all of them).

    before: earlier timings of the kernel on this vocabulary, if any.
    """
    if time.perf_counter() > deadline:
        return [], False
    kind, where = kind_of(device), torch.device(device)
    rows = max(2, CHUNK[kind] // (4 * aligned_size(vocab)))
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, aligned_size(vocab), device=device)[:, :vocab]
    fresh = torch.randn(rows, vocab, device=device, generator=generator)
    run = caller(kernel, logits, dtype, generator)
    timings: list[dict[str, Any]] = []
    expected: list[Tensor] = []

    def time_it(launch: tuning.Launch) -> None:
        row = {"kernel": kernel, "target": tuning.target(where), "vocab": vocab, "rows": rows, **vars(launch)}
        timings.append(row)
        with tuning.forced(launch):
            try:
                logits.copy_(fresh)
                results = [result.clone() for result in run()]  # compiles
                if not expected:
                    expected.extend(results)
                errors = list(map(relative_error, results, expected))
                row["error"] = max(errors)
                if not all(error <= TOLERANCE[dtype] for error in errors):  # which a NaN is not
                    row["status"] = "wrong"
                    return
                times = seconds_each(run, lambda: logits.copy_(fresh), device, ROUNDS[kind])
            except Exception as error:  # too many registers or threads for this device, say: not a candidate
                row["status"] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
                return
        row |= {"status": "ok", "seconds": statistics.median(times)}
        row["bytes_per_second"] = rows * vocab * TRAFFIC[kernel](dtype.itemsize) / row["seconds"]

    usual = tuning.launch(kernel, vocab, tuning.target(where))
    time_it(usual)
    tried = {usual, *(tuning.Launch(*map(timing.get, tuning.SETTINGS)) for timing in before)}
    either = kernel == "loss_gradient"  # the others read a row once
    launches = (launch.fitted(vocab) for launch in candidates(usual, before, kind))
    for launch in (launch for launch in launches if either or launch.backward == usual.backward):
        if time.perf_counter() > deadline:
            return timings, False
        if launch not in tried:
            tried.add(launch)
            time_it(launch)
    return timings, True


def seconds_each(run: Callable[[], object], restore: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Of calls that each find their inputs restored. On CUDA the host runs ahead: what Python takes to launch a call
    passes while the device restores, and nothing is waited for but the last of them."""
    times = []
    if kind_of(device) == "cpu":
        for _ in range(rounds):
            restore()
            times.append(timed(run, device))
        return times
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        restore()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


# Bytes per logit that must move at least: the second read, where it misses the L2, comes on top.
TRAFFIC: dict[str, Callable[[int], int]] = {
    "statistics": lambda out: 4,
    "gradient": lambda out: 4 + out,
    "loss_gradient": lambda out: 4 + out,
}


def caller(kernel: str, logits: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Callable[[], list[Tensor]]:
    """What launches a kernel on these logits, with the SRFT loss; returns its results."""
    from srft_kernels.rows.triton_rows import TritonRows

    rows = TritonRows()
    n, vocab = logits.shape
    draw = lambda: torch.randn(n, device=logits.device, generator=generator)  # noqa: E731
    tokens = sk.Tokens(
        torch.randint(vocab, (n,), device=logits.device, generator=generator),
        advantages=draw(),
        rewards=(draw() > 0).float(),
        is_demo=draw() > 0,
    )
    head = Head()
    dlogits = logits if dtype == logits.dtype else logits.new_empty(n, logits.stride(0), dtype=dtype)[:, :vocab]
    if kernel == "loss_gradient":
        weight = torch.full((n,), 1 / n, device=logits.device)

        def run() -> list[Tensor]:
            stats, loss = rows.loss_and_gradient(logits, dlogits, tokens, weight, sk.srft_paper(), head)
            return [*stats.fields(), loss, dlogits]

        return run
    logits.normal_(generator=generator)
    normalizer = rows.statistics(logits, tokens.target, head)[1]
    if kernel == "statistics":
        return lambda: list(rows.statistics(logits, tokens.target, head)[0].fields())
    coefs = draw(), draw(), draw()

    def run() -> list[Tensor]:
        rows.gradient(logits, dlogits, tokens.target, normalizer, coefs, head)
        return [dlogits]

    return run


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected.float()).abs().amax() / expected.float().abs().amax().clamp(min=1e-30))


def best(timings: list[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any] | None:
    """The table's row that these timings of one kernel on one vocabulary make; None where nothing was timed."""
    good = [timing for timing in timings if timing["status"] == "ok"]
    if not good or good[0] is not timings[0]:
        return None
    settings = lambda timing: [timing[name] for name in tuning.SETTINGS]  # noqa: E731
    usual = min((t for t in good if settings(t) == settings(good[0])), key=lambda timing: timing["seconds"])
    fastest = min(good, key=lambda timing: timing["seconds"])
    if fastest["seconds"] > (1 - GAIN) * usual["seconds"]:
        fastest = usual
    return {
        **{name: fastest[name] for name in ("kernel", "target")},
        "vocab": 1 << (fastest["vocab"] - 1).bit_length(),  # sizes up to a power of two, from half of it, share a row
        **{name: fastest[name] for name in tuning.SETTINGS},
        "measured": {
            "device": made["device"],
            "vocab": fastest["vocab"],
            "rows": fastest["rows"],
            "microseconds": round(1e6 * fastest["seconds"], 1),
            "of_the_settings_before": round(1e6 * usual["seconds"], 1),
            "packages": {name: made["packages"].get(name) for name in ("torch", "triton")},
            "commit": made["commit"],
        },
    }


def merged(rows: list[dict[str, Any]], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with these rows instead of those for the same, small vocabularies before large, rules for any last."""
    identity = lambda row: (row["kernel"], row["target"], row["vocab"])  # noqa: E731
    new = {identity(row) for row in rows}
    kept = [row for row in table if identity(row) not in new]
    return sorted(
        [*rows, *kept],
        key=lambda row: (row["target"] == "*", row["kernel"] == "*", row["target"], row["kernel"],
                         row["vocab"] is None, row["vocab"] or 0),
    )  # fmt: skip


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Beside the table as it was read: what is measured meanwhile goes on under the settings before."""
    record.replace(path, json.dumps(merged(rows, tuning.table()), indent=1) + "\n")


def lines(found: dict[str, Any]) -> Iterator[str]:
    for timing in found["timings"]:
        launch = f"block {timing['block']:>6} warps {timing['warps']:>2} programs {timing['programs'] or 'rows':>4}"
        launch += f" {'backward' if timing['backward'] else 'forward':<8}"
        speed = f"{1e6 * timing['seconds']:>10.1f} µs {timing['bytes_per_second'] / 1e12:6.2f} TB/s" \
            if timing["status"] == "ok" else timing["status"]  # fmt: skip
        yield f"{timing['kernel']:<14} {timing['target']:<7} {timing['vocab']:>7} {launch} {speed}"
    yield from (f"skipped: {what}" for what in found["skipped"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, help="default: the package's table; on a CPU none")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("make tune: torch finds no CUDA device here; `make tune DEVICE=cpu` rehearses without one",
              file=sys.stderr)  # fmt: skip
        return 2
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    out = options.out or (tuning.TABLE if cuda else None)
    keep = (lambda found: write(found["rows"], out)) if out else (lambda found: None)
    found = tune(options.device, options.seconds, each=keep)
    print(*lines(found), sep="\n")
    if out:
        print(f"\n{out}: {len(found['rows'])} rows measured")
    return 0 if found["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
