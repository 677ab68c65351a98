"""The run directory, and what a run writes into it while it goes: everything is flushed as soon as it is known.

config.toml         the resolved configuration
metrics.jsonl       one line per step; metrics.py explains every key
samples.jsonl       some generations of each step
evaluation.jsonl    one line per evaluation, all of its generations included
status.json         whether it runs, finished, or why it stopped
checkpoint-N, final, interrupted-N, report.html, tensorboard/
"""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srft.config import RunConfig
from srft.errors import UserError, first_line
from srft.tracker import Tracker

# What a run has before its first evaluation.
STARTED = ("config.toml", "data.json", "status.json", "report.html", "tensorboard", "wandb")
OURS = (
    "config.toml",
    "data.json",
    "status.json",
    "*.jsonl",
    "report.html",
    "checkpoint-*",
    "final",
    "interrupted-*",
    "tensorboard",
    "wandb",
)


def create_run_dir(config: RunConfig) -> Path:
    """Make `run.dir` and return it; {time} becomes the time now.

    A directory with something in it is refused, unless `run.overwrite`, or all there is is a run that was stopped
    before it had anything: what an earlier run wrote there then moves to `previous-1` (or the next free number) inside
    of it. Nothing is ever deleted.
    """
    path = Path(config.dir.replace("{time}", time.strftime("%Y-%m-%dT%H-%M-%S"))).expanduser()
    if "{time}" in config.dir:  # two runs may start in the same second
        base, number = path, 2
        while path.exists():
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir: {path} is a file; name a directory")
    try:
        if path.is_dir() and any(path.iterdir()):
            if not (config.overwrite or _only_started(path)):
                raise UserError(
                    f"run.dir: {path} exists and is not empty; name another directory, or pass --run.overwrite true "
                    "to move what an earlier run wrote there into a subdirectory"
                )
            _move_aside(path)
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # it may be there and not be ours to write into
    except OSError as error:
        raise UserError(f"run.dir: cannot write into {path}: {error.strerror}; name another directory") from error
    return path


def rewind_run_dir(path: Path, step: int, config: str) -> None:
    """Make `path` what it was after `step`, where its run goes on; what was written later moves to `previous-N`.

    So does config.toml if it is to become another one, `config`.
    """
    later = [*path.glob("interrupted-*"), *path.glob("final")]
    later += [file for file in path.glob("config.toml") if file.read_text(encoding="utf-8") != config]
    later += [each for each in path.glob("checkpoint-*") if (n := each.name[11:]).isdecimal() and int(n) > step]
    kept = {}
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"):
        rows = read_jsonl(path / name)
        up_to = [row for row in rows if row["step"] <= step]
        whole = not (path / name).exists() or (path / name).read_bytes().endswith(b"\n")
        if len(up_to) < len(rows) or not whole:
            kept[path / name] = path / f".{name}.partial"
            kept[path / name].write_text("".join(map(_line, up_to)), encoding="utf-8")
    later += path.glob("status.json") if later or kept else ()
    _set_aside(path, [*later, *kept])
    for file, partial in kept.items():
        partial.rename(file)


def _only_started(path: Path) -> bool:
    """Whether all that is there is what a run has before its first evaluation, and it has ended."""
    found = {entry.name for entry in path.iterdir() if not re.fullmatch(r"previous-\d+", entry.name)}
    ended = (read_status(path) or {}).get("state") in ("failed", "interrupted")
    return not found or (ended and found <= set(STARTED))


def _move_aside(path: Path) -> None:
    _set_aside(path, [entry for pattern in OURS for entry in path.glob(pattern)])


def _set_aside(path: Path, entries: list[Path]) -> None:
    if entries:
        number = next(n for n in range(1, 1_000_000) if not (path / f"previous-{n}").exists())
        (aside := path / f"previous-{number}").mkdir()
        for entry in entries:
            entry.rename(aside / entry.name)


def write_status(path: Path, state: str, step: int, steps: int, reason: str = "", resume: str = "") -> None:
    """state: running, finished, interrupted (by the signal `reason`) or failed (with the error `reason`).

    step of steps are done.   resume: the command that goes on, where one can.
    """
    status = {"state": state, "step": step, "steps": steps, "reason": reason, "resume": resume}
    partial = path / ".status.json.partial"
    with naming(path / "status.json"):
        partial.write_text(_line(status), encoding="utf-8")
        partial.rename(path / "status.json")


def read_status(path: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None of a run that has none."""
    return next(iter(read_jsonl(path / "status.json")), None)


class RunLog:
    """Appends to the run's files, one flushed line at a time, and tells numbers to its trackers.

    silent: writes nothing (a rank that is not the first).
    """

    def __init__(self, directory: Path, trackers: Sequence[Tracker] = (), *, silent: bool = False):
        self.directory, self.trackers, self.silent = directory, trackers, silent

    def metrics(self, values: dict[str, float]) -> None:
        self._append("metrics.jsonl", values)
        self._track({name: value for name, value in values.items() if name != "step"}, values["step"])

    def samples(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("samples.jsonl", row)

    def evaluation(self, step: int, evaluation: Any) -> None:
        self._append("evaluation.jsonl", {"step": step, **evaluation.as_dict()})
        if self.trackers:
            self._track({"eval/reward": evaluation.reward, "eval/loss": evaluation.loss}, step)

    def evaluations(self) -> list[dict[str, Any]]:
        """Those that an earlier part of the run made."""
        return read_jsonl(self.directory / "evaluation.jsonl")

    def _track(self, values: dict[str, float], step: int) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers:
            try:
                tracker.log(known, step)
            except Exception as error:  # a page about a run must not cost the run
                print(f"{tracker.name} is told nothing from step {step} on: {first_line(error)}", file=sys.stderr)
                self.trackers = [each for each in self.trackers if each is not tracker]

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.silent:
            return
        with naming(self.directory / name), (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:  # a page about a run must not cost the run
                print(f"{tracker.name} could not be closed: {first_line(error)}", file=sys.stderr)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of writing names `path`: Python's own, of a disk that is full, does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `RunLog` wrote; [] if there is none. A line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):  # str.splitlines would also cut at U+2028, which JSON allows in a text
        try:
            rows.append(json.loads(line))
        except ValueError:  # not JSON, or cut within a character
            continue
    return rows


def finite(value: Any) -> Any:
    """NaN and infinities are not JSON: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return value
