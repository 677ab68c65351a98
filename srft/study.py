"""A study, `srft study STUDY.toml`: the same job by several methods and seeds, one run after the other.

    [study]
    recipes = ["sft", "grpo", "sft_grpo", "srft_paper"]     # the most telling first
    seeds = [0, 1, 2]                                       # of training and of the train prompts
    dir = "studies/chain_sum"                               # default: studies/ and the name of the file

    [study.variants.srft_plus]                              # methods of one's own: a recipe, and settings over it
    recipe = "srft_paper"
    loss = {options = {entropy_sign = 1}}

    [train]                                                 # and what all of them have in common, as in a CONFIG.toml
    steps = 40

Every method runs with the first seed, then every one with the second, and so on; variants come after all recipes. So a
study that is stopped still says something. Started again it goes on: finished runs are skipped, a stopped one goes on
from its checkpoint, or begins anew where it has none. A run that fails is told, and the others follow.
"""

import itertools
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.checkpoint import newest_with_state
from srft.config import Config
from srft.errors import UserError, nearest
from srft.rundir import holding, let_go, read_status, write_whole
from srft.settings import configured, read_recipe, read_toml, to_toml
from srft.signals import Interrupted, listening

KEYS: dict[str, tuple[type, str]] = {
    "recipes": (list, "a list of names of recipes"),
    "seeds": (list, "a list of whole numbers"),
    "variants": (dict, "a table of methods"),
    "dir": (str, "the name of a directory"),
    "launch": (str, 'a command, such as "torchrun --standalone --nproc_per_node=8 -m srft"'),
}


@dataclass(frozen=True)
class Trial:
    """A run of a study."""

    method: str
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def state(self) -> str:
        """As in its status.json; "" where it has none."""
        return (read_status(self.directory) or {"state": ""})["state"]


@dataclass(frozen=True)
class Study:
    directory: Path
    launch: list[str]
    trials: list[Trial]


def load_study(path: str, overrides: list[str] | None = None) -> Study:
    """The runs of a study in their order. overrides: `--section.key value`, for all of them.

    Raises UserError for what is wrong with it, before anything runs.
    """
    tree = read_toml(path)
    where, study = f"{path}: study", tree.pop("study", None)
    if not isinstance(study, dict):
        raise UserError(
            f"{path}: expected a table [study] with recipes = [...], found {'none' if study is None else study!r}"
        )
    for key, value in study.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, KEYS)} (keys: {', '.join(KEYS)})")
        if not isinstance(value, KEYS[key][0]):
            raise UserError(f"{where}.{key}: expected {KEYS[key][1]}, found {value!r}")
    directory = Path(study.get("dir", f"studies/{Path(path).stem}")).expanduser()
    recipes, variants = methods_of(study, where)
    seeds = study.get("seeds", [0])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len({*seeds}) < len(seeds):
        raise UserError(f"{where}.seeds: expected different whole numbers from 0, found {seeds!r}")
    trials = []
    for methods in (recipes, variants):
        for seed, (name, changes) in itertools.product(seeds, methods.items()):
            own = {"train": {"seed": seed}, "data": {"seed": seed}, "run": {"dir": str(directory / f"{name}-{seed}")}}
            try:
                config = configured(tree, f"{path}: ", overrides, [*changes, own])
            except UserError as error:
                raise UserError(f"{error} (of {name} in {path})") from error
            trials.append(Trial(name, seed, config))
    launch = shlex.split(study.get("launch", "")) or [sys.executable, "-m", "srft"]
    return Study(directory, launch, trials)


Methods = dict[str, list[dict[str, Any]]]  # by name, the settings over those of all


def methods_of(study: dict[str, Any], where: str) -> tuple[Methods, Methods]:
    """The recipes and the variants."""
    names = study.get("recipes", [])
    tables = study.get("variants", {})
    if not names and not tables:
        raise UserError(f"{where}: nothing to run: name recipes or variants")
    if twice := [name for name in [*names, *tables] if [*names, *tables].count(name) > 1]:
        raise UserError(f"{where}: {twice[0]!r} is there twice; give one of them another name")
    recipes: Methods = {}
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{where}.recipes: expected names of recipes, found {name!r}")
        recipes[name] = [read_recipe(name)]
    variants: Methods = {}
    for name, variant in tables.items():
        if not isinstance(variant, dict) or not isinstance(variant.get("recipe", ""), str):
            raise UserError(
                f'{where}.variants.{name}: expected a table with recipe = "…" and settings, found {variant!r}'
            )
        if "/" in name:
            raise UserError(f"{where}.variants.{name}: a name is part of a directory's, and has no /")
        changes = {key: value for key, value in variant.items() if key != "recipe"}
        variants[name] = [*([read_recipe(variant["recipe"])] if "recipe" in variant else []), changes]
    return recipes, variants


def run_study(study: Study) -> list[Trial]:
    """Run what is not finished; returns the runs that failed.

    Raises UserError where an earlier start of it had other settings, and Interrupted where a run was stopped.
    """
    study.directory.mkdir(parents=True, exist_ok=True)
    with listening(), holding(study.directory):
        for trial in study.trials:
            check_unchanged(trial)
        failed = [trial for number, trial in enumerate(study.trials, 1) if not ran(study, trial, number)]
        let_go(study.directory)
    return failed


def check_unchanged(trial: Trial) -> None:
    """Raise UserError where the run was begun with other settings: its numbers would stand beside those of others."""
    file, settings = settings_file(trial), to_toml(trial.config)
    if file.exists() and file.read_text(encoding="utf-8") != settings:
        raise UserError(
            f"{file}: the study was begun with other settings; put them back, or give the new ones another study.dir"
        )


def settings_file(trial: Trial) -> Path:
    return trial.directory.with_name(f"{trial.directory.name}.toml")


def ran(study: Study, trial: Trial, number: int) -> bool:
    """Run it where it has not finished; whether it has now."""
    title = f"{trial.directory.name} ({number} of {len(study.trials)})"
    if trial.state == "finished":
        print(f"{title}: finished before", flush=True)
        return True
    file = settings_file(trial)
    write_whole(file, to_toml(trial.config))
    command = [*study.launch, "train", str(file)]
    if newest_with_state(trial.directory):
        command = [*study.launch, "train", "--resume", str(trial.directory)]
    elif trial.directory.exists():
        command += ["--run.overwrite", "true"]
    print(f"{title}: {shlex.join(command)}", flush=True)
    code = completed(command)
    if trial.state == "interrupted":  # by a signal that this process did not get
        raise Interrupted(signal.SIGTERM)
    if code or trial.state != "finished":
        print(f"warning: {title}: failed with exit code {code}; the others follow", file=sys.stderr)
        return False
    return True


def completed(command: list[str]) -> int:
    """The exit code of a command. A signal is the command's too, and is raised when it has ended in order."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except Interrupted as error:
        if error.number != signal.SIGINT:  # Ctrl-C goes to all that run in a terminal
            process.send_signal(error.number)
        process.wait()
        raise
