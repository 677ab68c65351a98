"""A study, `srft study STUDY.toml`: the same job by several methods and seeds, one run after the other.

    [study]
    methods = ["srft_paper", "sft", "grpo"]                 # names of recipes and variants, the most telling first
    seeds = [0, 1, 2]                                       # of training and of the train prompts
    dir = "runs/chain_sum"                                  # default: runs/ and the name of the file

    [study.variants.srft_plus]                              # a method of one's own: a recipe, and settings over it
    recipe = "srft_paper"
    seeds = [0]                                             # default: those above
    loss = {options = {entropy_sign = 1}}

    [train]                                                 # and what all of them have in common, as in a CONFIG.toml
    steps = 40

    [study]                                                 # or all that another study has, and this in place of that
    like = "chain_sum.toml"

Every method runs with the first seed, then every one with the second, and so on; variants that methods does not name
come after them, those of another study not at all where this one has methods of its own. So a study that is stopped
still says something. Where eval.sets names sets, the model is measured on them as it is at first,
and after each run. Started again a study goes on: what is finished is skipped, a stopped run goes on from its
checkpoint, or begins anew where it has none. A run that fails is told, and the others follow.
"""

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.errors import UserError, check_known, nearest
from srft.rundir import read_status
from srft.settings import check_keys, configured, over, pairs, read_recipe, read_toml

KEYS: dict[str, tuple[type, str]] = {
    "like": (str, "the file of another study"),
    "methods": (list, "a list of names of recipes and variants"),
    "seeds": (list, "a list of whole numbers"),
    "variants": (dict, "a table of methods"),
    "dir": (str, "the name of a directory"),
    "launch": (str, 'a command, such as "torchrun --standalone --nproc_per_node=8 -m srft"'),
}
BASE = "base"  # the method that does nothing
EVALUATION = "eval"  # what `srft eval` wrote, in a run's directory
OF_TRIALS = ("train.seed", "data.seed", "run.dir")  # what each run has of its own
NAME_HAS = "at most 100 characters on a line, no / or {time}, no dot first"
ALONE = [sys.executable, "-m", "srft"]


@dataclass(frozen=True)
class Trial:
    """A run of a study, and the evaluation after it; of BASE the evaluation alone."""

    method: str
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def state(self) -> str:
        """Of the run, as in its status.json; "" where it has none."""
        return (read_status(self.directory) or {"state": ""})["state"]

    @property
    def trained(self) -> bool:
        return self.method == BASE or self.state == "finished"

    @property
    def measured(self) -> bool:
        return not self.config.eval.sets or (self.directory / EVALUATION).is_dir()

    @property
    def settings(self) -> Path:
        """A file of its own: the run's config.toml says how many steps an epoch has."""
        return self.directory.with_name(f"{self.directory.name}.toml")


@dataclass(frozen=True)
class Study:
    directory: Path
    launch: list[str]
    trials: list[Trial]


def load_study(path: str, overrides: list[str] | None = None) -> Study:
    """The runs of a study in their order. overrides: `--section.key value`, for all of them.

    Raises UserError for what is wrong with it, before anything runs.
    """
    over_all = {".".join(key.split(".")[:2]): f"--{key}" for key, _ in pairs(overrides or [])}
    tree, study = read_study(path)
    where = f"{path}: study"
    for key, written in {**{key: f"{path}: {key}" for key in check_keys(tree, f"{path}: ")}, **over_all}.items():
        if key in OF_TRIALS:
            raise UserError(f"{written}: each run of a study has its own; write study.seeds or study.dir in {path}")
    directory = directory_of(path, study)
    launch = launch_of(study, where)
    trials = []
    for method, seed in order_of(*methods_of(study, where)):
        for key in itertools.chain(*(check_keys(each, f"{where}.variants.{method.name}: ") for each in method.changes)):
            if key in OF_TRIALS:
                raise UserError(f"{where}.variants.{method.name}: {key}: each run of a study has its own")
            if key in over_all:
                raise UserError(f"{over_all[key]}: {method.name} has its own; write it into study.variants, {path}")
        name = f"{method.name}-{seed}" if method.name != BASE else BASE
        own = {"train": {"seed": seed}, "data": {"seed": seed}, "run": {"dir": str(directory / name)}}
        try:
            config = configured(tree, f"{path}: ", overrides, [*method.changes, own])
        except UserError as error:
            raise UserError(f"{error} (of {method.name} in {path})") from error
        trials.append(Trial(method.name, seed, config))
    if not trials[0].config.eval.sets:
        del trials[0]  # there is nothing to measure the base on
    return Study(directory, launch, trials)


def directory_of(path: str, study: dict[str, Any] | None = None) -> Path:
    """Where a study's runs are. study: its table, where it was read."""
    study, where = read_study(path)[1] if study is None else study, f"{path}: study"
    name = study.get("dir", f"runs/{Path(path).stem}")
    if not name.strip() or "{time}" in name:
        raise UserError(f"{where}.dir: expected the name of a directory that stays the same, found {name!r}")
    try:
        directory = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where}.dir: {name!r}: there is no such home directory") from error
    there = next(each for each in (directory, *directory.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise UserError(f"{where}.dir: {there} is no directory; name one that is, or that is not there yet")
    return directory


def launch_of(study: dict[str, Any], where: str) -> list[str]:
    """The command that runs srft, in words."""
    try:
        words = shlex.split(study.get("launch", ""))
    except ValueError as error:
        raise UserError(f"{where}.launch: expected {KEYS['launch'][1]}, found {study['launch']!r}: {error}") from error
    if words and not shutil.which(words[0]):
        raise UserError(f"{where}.launch: there is no command {words[0]!r}")
    return words or ALONE


def read_study(path: str, *seen: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that all runs have in common, and the table [study], with what another study gives to both."""
    tree = read_toml(path)
    where, study = f"{path}: study", tree.pop("study", None)
    if not isinstance(study, dict):
        raise UserError(
            f"{path}: expected a table [study] with methods = [...], found {'none' if study is None else repr(study)}"
        )
    check_known(study, KEYS, where)
    for key, value in study.items():
        if not isinstance(value, KEYS[key][0]):
            raise UserError(f"{where}.{key}: expected {KEYS[key][1]}, found {value!r}")
    list(check_keys(tree, f"{path}: "))
    if "like" not in study:
        return tree, study
    this = Path(path).expanduser().resolve()
    other = (this.parent / study.pop("like")).resolve()
    if other in (this, *seen):
        raise UserError(f"{where}.like: {other.name} is like this one; name another study")
    settings, of_other = read_study(str(other), this, *seen)
    whole = {key: value for key, value in of_other.items() if key != "dir"} | study
    named = study.get("methods")
    others = {name: each for name, each in of_other.get("variants", {}).items() if named is None or name in named}
    return over(settings, tree), whole | {"variants": others | study.get("variants", {})}


@dataclass(frozen=True)
class Method:
    """changes: settings over those of all, in their order."""

    name: str
    seeds: list[int]
    changes: list[dict[str, Any]]


def methods_of(study: dict[str, Any], where: str) -> tuple[list[Method], list[Method]]:
    """Those that it names, and its other variants."""
    names, tables, seeds = study.get("methods", []), study.get("variants", {}), seeds_of(study, where)
    if not names and not tables:
        raise UserError(f"{where}: nothing to run: name methods, or give variants")
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{where}.methods: expected names of recipes and variants, found {odd[0]!r}")
    if BASE in (*names, *tables):
        raise UserError(f"{where}: {BASE!r} is the model as it is, and measured anyway; give the method another name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}.methods: {twice[0]!r} is there twice")
    variants = {}
    for name, variant in tables.items():
        if not isinstance(variant, dict) or not isinstance(variant.get("recipe", ""), str):
            raise UserError(
                f'{where}.variants.{name}: expected a table with recipe = "…" and settings, found {variant!r}'
            )
        if not is_name(name):
            raise UserError(f"{where}.variants.{name}: a name is part of a directory's: {NAME_HAS}")
        changes = {key: value for key, value in variant.items() if key not in ("recipe", "seeds")}
        recipe = [recipe_of(variant["recipe"], f"{where}.variants.{name}")] if "recipe" in variant else []
        own = seeds_of({"seeds": seeds} | variant, f"{where}.variants.{name}")
        variants[name] = Method(name, own, [*recipe, changes])
    named = [variants.pop(name, None) or Method(name, seeds, [recipe_of(name, where, tables)]) for name in names]
    return named, list(variants.values())


def is_name(name: str) -> bool:
    """May a method have it? It becomes part of a directory's and a file's."""
    return bool(re.fullmatch(r"[^/.][^/\x00-\x1f]{0,99}", name)) and "{time}" not in name


def recipe_of(name: str, where: str, variants: Iterable[str] = ()) -> dict[str, Any]:
    try:
        return read_recipe(name)
    except UserError as error:
        if close := nearest(name, variants):
            raise UserError(f"{where}: method {name!r} is not known{close}") from error
        raise UserError(f"{where}: {error}") from error


def seeds_of(table: dict[str, Any], where: str) -> list[int]:
    seeds = table.get("seeds", [0])
    fit = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not fit or len({*seeds}) < len(seeds):
        raise UserError(f"{where}.seeds: expected different whole numbers from 0, found {seeds!r}")
    return seeds


def order_of(*groups: list[Method]) -> Iterator[tuple[Method, int]]:
    """The methods and their seeds, after the base, one group after the other."""
    yield Method(BASE, [0], []), 0
    for methods in groups:
        for rank in itertools.count():
            of_rank = [(method, method.seeds[rank]) for method in methods if rank < len(method.seeds)]
            if not of_rank:
                break
            yield from of_rank
