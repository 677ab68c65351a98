"""The run directory, and what a run writes into it while it goes: everything is flushed as soon as it is known.

config.toml         the resolved configuration
origin.json         code and machine
metrics.jsonl       one line per step; metrics.py explains every key
samples.jsonl       some generations of each step
evaluation.jsonl    one line per evaluation, all of its generations included
status.json         whether it runs, finished, or why it stopped
checkpoint-N, final, interrupted-N, report.html, tensorboard/
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srft.config import RunConfig
from srft.errors import UserError, first_line
from srft.tracker import Tracker

ORIGIN = "origin.json"
OURS = (
    *("config.toml", ORIGIN, "data.json", "status.json", "report.html"),
    *("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"),
    *("checkpoint-*", "final", "adapter", "interrupted-*", "eval", "eval-*", "tensorboard", "wandb"),
)
RUN = ("status.json", "data.json")  # by which a run's directory is known; a config.toml may be anyone's


def create_run_dir(config: RunConfig) -> Path:
    """Make `run.dir`, keep other runs out of it (see `hold`) and return it; {time} becomes the time now.

    A directory with something in it is refused, unless `run.overwrite`, or all there is is a run that was stopped
    before it had anything: what an earlier run wrote there then moves to `previous-1` (or the next free number) inside
    of it. Nothing is ever deleted, and nothing moves that no run wrote.
    """
    path = named(config.dir, "run.dir")
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir: {path} is a file; name a directory")
    try:
        if "{time}" in config.dir:
            path = _new(path)
        path.mkdir(parents=True, exist_ok=True)
        with holding(path):
            if any(path.iterdir()) and not _only_started(path):
                check_overwritten(path, config)
            _set_aside(path, [entry for pattern in OURS for entry in path.glob(pattern)])
            tempfile.TemporaryFile(dir=path).close()  # it may be there and not be ours to write into
    except OSError as error:
        raise UserError(f"run.dir: cannot write into {path}: {error.strerror}; name another directory") from error
    return path


def create_eval_dir(name: str, option: str = "eval.dir") -> Path:
    """Make the directory and return it; {time} becomes the time now. One with something in it is refused."""
    path = named(name, option)
    try:
        if "{time}" in name:
            return _new(path)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"{option}: {path} exists and is not empty; name another directory")
    except OSError as error:
        raise UserError(f"{option}: cannot write into {path}: {error.strerror}; name another directory") from error
    return path


def check_overwritten(path: Path, config: RunConfig) -> None:
    """Raise UserError where what is in a directory is not to be moved."""
    if not config.overwrite:
        advice = ", or pass --run.overwrite true to move what an earlier run wrote there into a subdirectory"
        found = f"run.dir: {path} exists and is not empty; name another directory"
        raise UserError(f"{found}{advice * _is_run(path)}")
    if not _is_run(path):
        found = f"run.dir: {path} is not the directory of a run (neither {' nor '.join(RUN)} is in it)"
        raise UserError(f"{found}, so that run.overwrite moves nothing there; name another one")


def rewind_run_dir(path: Path, step: int, config: str) -> None:
    """Make `path` what it was after `step`, where its run goes on, and keep other runs out of it.

    What was written later moves to `previous-N`; config.toml is copied there if it is to become another one, `config`.
    """
    with holding(path):
        later = [each for name in ("interrupted-*", "final", "adapter", "eval", "eval-*") for each in path.glob(name)]
        later += [each for each in path.glob("checkpoint-*") if (n := each.name[11:]).isdecimal() and int(n) > step]
        anew = {}
        for name in ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"):
            rows = read_jsonl(path / name)
            up_to = [row for row in rows if row["step"] <= step]
            whole = not (path / name).exists() or (path / name).read_bytes().endswith(b"\n")
            if len(up_to) < len(rows) or not whole:
                anew[path / name] = "".join(map(_line, up_to))
        changed = [file for file in path.glob("config.toml") if file.read_text(encoding="utf-8") != config]
        if later or anew or changed:
            _set_aside(path, later, [*anew, *changed, *path.glob("status.json")])
        for file, text in anew.items():
            write_whole(file, text)


def named(name: str, option: str) -> Path:
    """What a setting names, with the time now for {time}."""
    if not name.strip():
        raise UserError(f"{option}: expected the name of a directory, found none")
    return Path(name.replace("{time}", time.strftime("%Y-%m-%dT%H-%M-%S"))).expanduser()


def _new(path: Path) -> Path:
    """Make the directory, or where it is there `path-2`, …: two runs may start in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for each in itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            each.mkdir()
            return each
    raise AssertionError("numbers do not end")


def _only_started(path: Path) -> bool:
    """Whether all there is is what a run has before its first evaluation; it has ended, since the directory is held."""
    found = {entry.name for entry in path.iterdir() if not re.fullmatch(r"previous-\d+|\..*\.partial", entry.name)}
    started = {*RUN, "config.toml", ORIGIN, "report.html", "tensorboard", "wandb"}
    return found <= started and (not found or _is_run(path))


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN)


def _set_aside(path: Path, entries: Sequence[Path], copies: Sequence[Path] = ()) -> None:
    """Move `entries` to the next `previous-N`, if there is something to move, and copy there what is written anew
    after this: a run that is killed in between misses nothing."""
    if not entries and not copies:
        return
    number = next(n for n in itertools.count(1) if not (path / f"previous-{n}").exists())
    (aside := path / f"previous-{number}").mkdir()
    for copy in copies:
        shutil.copy2(copy, aside / copy.name)
    for entry in entries:
        entry.rename(aside / entry.name)


_held: dict[Path, int] = {}  # the directories that this process writes into, with the open files that hold their locks


def hold(path: Path) -> None:
    """Keep other runs from writing into a run's directory, until `let_go` or the end of this process.

    Raises UserError where another one does. Where a file system knows no locks, only this process is kept out.
    """
    if (where := path.resolve()) in _held:
        raise UserError(f"{path}: this process is writing a run there already; wait for its end")
    opened = os.open(where, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(opened)
        raise UserError(f"{path}: another process is writing its run there; wait for its end, or stop it") from error
    except OSError:
        pass
    _held[where] = opened


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """`hold`, and `let_go` where an error comes; what is done within is the beginning of a run."""
    hold(path)
    try:
        yield
    except BaseException:
        let_go(path)
        raise


def let_go(path: Path) -> None:
    """The opposite of `hold`, where this process holds it."""
    if (opened := _held.pop(path.resolve(), None)) is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)  # a process that was forked may have the file open too
        os.close(opened)


def _forget() -> None:
    """A process that was forked from a run's, for its rewards say, does not hold what the run holds."""
    for opened in _held.values():
        os.close(opened)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def write_status(path: Path, state: str, step: int, steps: int, reason: str = "", resume: str = "") -> None:
    """state: running, finished, interrupted (by the signal `reason`) or failed (with the error `reason`).

    step of steps are done.   resume: the command that goes on, where one can.
    """
    status = {"state": state, "step": step, "steps": steps, "reason": reason, "resume": resume}
    write_whole(path / "status.json", _line(status))


def read_status(path: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None of a run that has none, or a damaged one."""
    rows = read_jsonl(path / "status.json")
    return next((row for row in rows if isinstance(row, dict) and {"state", "step"} <= row.keys()), None)


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
        append_line(self.directory / name, row)

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:  # a page about a run must not cost the run
                print(f"{tracker.name} could not be closed: {first_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of writing names `path`: Python's own, of a disk that is full, does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as it was, or as it is now, whatever ends the process."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)


def append_line(path: Path, row: dict[str, Any]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `RunLog` wrote; [] if there is none. A line that is no row, or cut off, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):  # str.splitlines would also cut at U+2028, which JSON allows in a text
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or cut within a character
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def finite(value: Any) -> Any:
    """NaN and infinities are not JSON: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value
