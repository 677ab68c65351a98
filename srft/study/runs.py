"""The runs of a study, one after the other; what is finished is skipped."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from srft.benchmarks import load_sets
from srft.checkpoint import newest_with_state
from srft.config import Config, DataConfig
from srft.data import digest_of_files
from srft.errors import UserError
from srft.learn.stages import parts_of
from srft.resume import DATA
from srft.rundir import holding, let_go, write_whole
from srft.settings import differing, flat, load, to_toml
from srft.signals import Interrupted, listening
from srft.study.matrix import ALONE, BASE, EVALUATION, Study, Trial
from srft.study.record import read_json


def run_study(study: Study) -> list[Trial]:
    """Run what is not finished; returns the runs that failed.

    Raises UserError where an earlier start of it had other settings, and Interrupted where a run was stopped.
    """
    check_whole(study)
    try:
        study.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"study.dir {study.directory}: cannot be made: {error.strerror}") from error
    failed = []
    with listening(), holding(study.directory):
        check_unchanged(study.trials)
        for number, trial in enumerate(study.trials, 1):
            if not ran(study, trial, number):
                failed.append(trial)
                if trial.method == BASE:
                    print("error: the model could not be measured, so no run could be; stopped", file=sys.stderr)
                    break
                print("the others follow", file=sys.stderr)
        let_go(study.directory)
    return failed


def check_whole(study: Study) -> None:
    """Raise UserError for a method that is none, or a set that cannot be read: not after hours of other runs."""
    for trial in study.trials:
        try:
            parts_of(trial.config)
        except UserError as error:
            raise UserError(f"{error} (of {trial.method})") from error
    load_sets(study.trials[0].config)


def check_unchanged(trials: Iterable[Trial]) -> None:
    """Raise UserError where a run was begun with other settings or data: its numbers would stand beside others'."""
    files: dict[str, str] = {}
    for trial in trials:
        check_settings(trial.settings, trial.config)
        check_settings(trial.directory / "config.toml", trial.config, of_run=True)
        begun = read_json(trial.directory / DATA).get("files")
        named = f"{trial.config.data.train_file} {trial.config.data.eval_file}"
        if begun and named not in files:
            files[named] = digest_if_there(trial.config.data)
        if begun and (now := files[named]) not in (begun, ""):
            raise UserError(
                f"{trial.directory}: begun with other data files ({begun}, now {now}); put back what was in them, or "
                "give the study another study.dir"
            )


def digest_if_there(config: DataConfig) -> str:
    """A run that needs files which are not there any more says so itself."""
    try:
        return digest_of_files(config)
    except (UserError, OSError):
        return ""


def check_settings(file: Path, asked: Config, of_run: bool = False) -> None:
    """of_run: it is the run's own, which says how many steps an epoch has."""
    if not file.exists():
        return
    begun = load(str(file))
    begun.run.overwrite = asked.run.overwrite  # of that start, which may have found a run without a checkpoint
    if of_run and asked.train.epochs:
        begun.train.steps, begun.train.epochs = asked.train.steps, asked.train.epochs
    for key, (one, another) in differing(flat(asdict(begun)), flat(asdict(asked))).items():
        found = f"begun with {key} {one!r}, now it is {another!r}"
        raise UserError(f"{file}: {found}; put it back, or give the study another study.dir")


def ran(study: Study, trial: Trial, number: int) -> bool:
    """Run and measure it where that is not done; whether it is now."""
    title = f"{trial.directory.name} ({number} of {len(study.trials)})"
    if trial.trained and trial.measured:
        print(f"{title}: finished before", flush=True)
        return True
    write_whole(trial.settings, to_toml(trial.config))
    return (trial.trained or trains(study, trial, title)) and (trial.measured or measures(trial, title))


def trains(study: Study, trial: Trial, title: str) -> bool:
    command = [*study.launch, "train", str(trial.settings)]
    if newest_with_state(trial.directory):
        command = [*study.launch, "train", "--resume", str(trial.directory)]
    elif trial.directory.exists():
        command += ["--run.overwrite", "true"]
    code = completed(command, title)
    if trial.state == "interrupted" and not 0 <= code < 128:  # by a signal that this process did not get
        raise Interrupted(signal.SIGTERM)
    return ended(title, 0 if trial.trained else code or 1)


def measures(trial: Trial, title: str) -> bool:
    """Its evaluation gets its name when it is whole."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    begun = next(each for n in itertools.count(1) if not (each := trial.directory / f"{EVALUATION}-{n}").exists())
    command = [*ALONE, "eval", str(trial.settings), "--eval.dir", str(begun)]
    if trial.method != BASE:
        command += ["--checkpoint", str(trial.directory / "final")]
    code = completed(command, title)
    if not code and "left_out" not in json.loads((begun / "scores.json").read_text(encoding="utf-8")):
        begun.rename(trial.directory / EVALUATION)
    return ended(title, 0 if trial.measured else code or 1)


def ended(title: str, code: int) -> bool:
    if code:
        print(f"warning: {title}: failed with exit code {code}", file=sys.stderr)
    return not code


def completed(command: list[str], title: str) -> int:
    """The exit code of a command. A signal is the command's too, and is raised when it has ended in order."""
    print(f"{title}: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except Interrupted as error:
        if error.number != signal.SIGINT:  # Ctrl-C goes to all that run in a terminal
            process.send_signal(error.number)
        process.wait()
        raise
