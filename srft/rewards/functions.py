"""A reward function of the user: found by its name, and called as it expects to be.

Which of the known forms a function has, its parameters tell:

    f(prompts, completions, **columns)             ours; the first two by place, whatever they are called
    f(completions, answer, **kwargs)               TRL's; everything by name, `completions` or `completion_ids` among it
    f(data_source, solution_str, ground_truth, extra_info=None)              verl's; one completion at a time

The first two get lists of one length, with an entry per completion. Each may be async.
"""

import asyncio
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from srft.errors import UserError, nearest

SIGNATURE = (
    "def reward(prompts, completions, **columns) -> list[float | None], TRL's (completions, **kwargs), or verl's "
    "(data_source, solution_str, ground_truth, extra_info=None)"
)
ASKED_FOR = frozenset({"finished", "completion_ids"})  # for a function that names them, not part of **columns
OURS = ASKED_FOR | {"prompts", "completions", "answer", "demonstration", "task"}
# A function whose first two parameters have such names does not expect prompts and completions there.
NOT_FIRST = OURS - {"prompts"} | {"completion", "response", "responses", "solution", "ground_truth", "data_sources"}
NOT_SECOND = OURS - {"completions"} | {"prompt", "question", "solution", "ground_truth"}

Form = Literal["by place", "by name", "verl"]


class Function:
    """One reward function.

    name: `package.module:function`, `path/to/file.py:function`, or any name for a function that is given.
    conversational: prompts and completions are chats, as TRL gives them where its data has chats.
    single: it is called with one completion at a time.
    """

    confined = True  # it may hang or crash
    needs_answer = False

    def __init__(self, name: str, function: Callable | None = None, conversational: bool = False):
        """Raises UserError for a function that cannot be found, or whose parameters are of no known form."""
        self.name, self.conversational = name, conversational
        self.function = import_function(name) if function is None else function
        self.form, self.names, self.needs, self.rest = form_of(name, self.function)
        self.single = self.form == "verl"

    def __reduce__(self) -> tuple:
        return Function, (self.name, None, self.conversational)  # another process finds it by its name

    def load(self) -> None:
        pass

    def wants(self, column: str) -> bool:
        if column in self.names or column in ("prompts", "completions"):
            return True
        return column not in ASKED_FOR and (self.rest or self.form == "verl")

    def missing(self, there: set[str]) -> set[str]:
        """Columns that it names without a default and that are not `there`."""
        of_verl = {"data_source", "solution_str", "extra_info"} | ({"ground_truth"} if "answer" in there else set())
        return self.needs - there - (of_verl if self.form == "verl" else set())

    def __call__(self, prompts: list, completions: list[str], **columns: list) -> Any:
        """What the function gives for a list of completions; raises what it raises."""
        if self.form == "verl":
            return self.as_verl(completions, columns)
        if self.conversational:
            prompts = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        if self.form == "by place":
            return awaited(self.function(prompts, completions, **columns))
        columns |= {"prompts": prompts, "completions": completions}
        return awaited(self.function(**{name: of for name, of in columns.items() if self.rest or name in self.names}))

    def as_verl(self, completions: list[str], columns: dict[str, list]) -> list[Any]:
        """verl's names for what there is: a row's task and answer, unless it has columns of these names."""
        given = columns | {
            "data_source": columns.get("data_source", columns["task"]),
            "solution_str": completions,
            "ground_truth": columns.get("ground_truth", columns["answer"]),
            "extra_info": [each or {} for each in columns.get("extra_info", [None] * len(completions))],
        }
        rows = [{name: given[name][index] for name in self.names if name in given} for index in range(len(completions))]
        return [awaited(self.function(**row)) for row in rows]


def form_of(name: str, function: Callable) -> tuple[Form, set[str], set[str], bool]:
    """How a function is called, the columns that it names, those without a default, and whether it takes all others."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may not tell
        return "by place", set(), set(), True
    parameters = list(signature.parameters.values())
    rest = any(each.kind is each.VAR_KEYWORD for each in parameters)
    by_place = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    names = {each.name for each in named}
    form: Form = "by place"
    if "solution_str" in names:
        form, rest = "verl", False
    elif names & {"completions", "completion_ids"} or (rest and len(by_place) < 2):
        form = "by name"
    unfit = False
    if form == "by place":
        unfit = any(each.name in others for each, others in zip(by_place, (NOT_FIRST, NOT_SECOND)))
        unfit |= len(by_place) < 2 and not any(each.kind is each.VAR_POSITIONAL for each in parameters)
        named, by_place = [each for each in named if each not in by_place[:2]], by_place[2:]
    if unfit or any(each.kind is each.POSITIONAL_ONLY and each.default is each.empty for each in by_place):
        raise UserError(f"reward.name {name!r}: expected {SIGNATURE}, found the signature {signature}")
    needs = {each.name for each in named if each.default is each.empty}
    return form, {each.name for each in named}, needs, rest


def awaited(given: Any) -> Any:
    """What an async function comes to; anything else as it is."""
    if not inspect.isawaitable(given):
        return given

    async def result(of: Awaitable) -> Any:
        return await of

    with ThreadPoolExecutor(1) as thread:  # this one may run an event loop already, as a notebook's does
        return thread.submit(asyncio.run, result(given)).result()


def import_function(name: str) -> Callable:
    """`package.module:function`, looked for in the current directory too, or `path/to/file.py:function`."""
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise UserError(f"reward.name: expected package.module:function or file.py:function, found {name!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there by itself
    file = Path(module_name).expanduser() if module_name.endswith(".py") or "/" in module_name else None
    if file and not file.is_file():
        raise UserError(f"reward.name {name!r}: there is no file {module_name}")
    try:
        module = import_file(file) if file else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        found = f"importing {module_name!r} raised {type(error).__name__}: {error}"
        looked = "" if file else f"; it is looked for in {here} and among installed packages"
        raise UserError(f"reward.name {name!r}: {found}{looked}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        there = hasattr(module, function_name)
        found = f", it is of type {type(function).__name__}" if there else nearest(function_name, known)
        raise UserError(f"reward.name {name!r}: {module_name} has no function {function_name!r}{found}")
    return function


def import_file(file: Path) -> ModuleType:
    """The module in a file, which finds the modules beside it. Imported once, under a name that no package has."""
    name = "reward_of_" + re.sub(r"\W", "_", str(file.resolve()))
    if name not in sys.modules:
        if (folder := str(file.resolve().parent)) not in sys.path:
            sys.path.append(folder)
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None:
            raise ImportError("expected a file that ends in .py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
