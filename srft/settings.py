"""Settings as users write them: TOML, and `--section.key value` over it, become one `Config`; and back into TOML.

    config = load("my.toml", ["--train.lr", "1e-5", "--data.tasks", "chain_sum", "gsm_symbolic"])
    config.train.lr                    # 1e-05
    to_toml(config)                    # the resolved configuration, which `load` reads again
    load("my.toml", recipes=["grpo"])  # a recipe that comes with srft, over the file

Which settings there are is in config.py. `load` needs jsonargparse.
"""

import copy
import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from srft.config import Config, Section, Tables
from srft.errors import UserError, missing, nearest
from srft.words import meant

SECTIONS: dict[str, type[Section]] = {each.name: each.default_factory for each in dataclasses.fields(Config)}
RECIPES = Path(__file__).parent / "recipes"
OF_STAGES = ("loss", "rollout", "train")  # what a stage of a run may set, but for what all of the run has in common
OF_EVALUATION = {"rollout.max_new_tokens", "train.token_budget"}  # the run's, also where each stage has its own
OF_THE_RUN = ("rollout.engine", "train.stages", "train.seed", "train.optimizer", "train.share_prompts")


def load(path: str | None = None, overrides: list[str] | None = None, recipes: Sequence[str] = ()) -> Config:
    """The defaults, changed by a TOML file, changed by recipes, changed by `--section.key value` arguments.

    Lists take several values (`--data.tasks chain_sum gsm_symbolic`), tables take dotted keys
    (`--data.task_args.chain_sum.max_terms 4`), a flag alone is true. Raises UserError for a file that cannot be
    read, an unknown recipe, section or key (naming the nearest known one), and a value of the wrong type or out of
    bounds.
    """
    return configured(read_toml(path) if path else {}, f"{path}: ", overrides, [read_recipe(name) for name in recipes])


def configured(
    tree: dict[str, Any], where: str, overrides: list[str] | None = None, changes: Sequence[dict[str, Any]] = ()
) -> Config:
    """What `load` makes of a nested dictionary, those over it, and arguments. where: what errors in it begin with."""
    of_file = set(check_keys(tree, where))
    for each in changes:
        of_file.difference_update(check_keys(each, where))
        tree = over(tree, each)
    for key, values in pairs(overrides or []):
        override(tree, key, values)
        of_file.discard(".".join(key.split(".")[:2]))
    try:
        config = build(tree)
    except UserError as error:
        key = str(error).partition(":")[0]
        raise UserError(f"{where if key in of_file else ''}{error}") from error
    config.train.stages = [stage_table(entry, number) for number, entry in enumerate(config.train.stages, 1)]
    for key, _ in pairs(overrides or []):
        section, name = key.split(".")[:2]
        in_each = config.train.stages and all(name in stage.get(section, {}) for stage in config.train.stages)
        if in_each and f"{section}.{name}" not in OF_EVALUATION:
            of_stages = ", ".join(stage["name"] for stage in config.train.stages)
            there = f"--train.stages '{{recipe = \"…\", {section} = {{{name} = …}}}}' …"
            raise UserError(f"--{key}: each of train.stages ({of_stages}) has its own; write it there: {there}")
    return config


def check_keys(tree: dict[str, Any], where: str) -> Iterator[str]:
    """The keys of a nested dictionary, section.name; raises UserError, beginning with `where`, for an unknown one."""
    for section, values in tree.items():
        if section not in SECTIONS and not isinstance(values, dict):
            check_key(section, where)
        if section not in SECTIONS:
            known = f" (sections: {', '.join(SECTIONS)})"
            hint = meant(section, [f"{each}.{name}" for each in SECTIONS for name in fields_of(each)])
            raise UserError(f"{where}unknown section [{section}]{hint or nearest(section, SECTIONS)}{known}")
        if not isinstance(values, dict):
            raise UserError(f"{where}{section}: expected a table [{section}], found {values!r}")
        for key in values:
            check_key(f"{section}.{key}", where)
            yield f"{section}.{key}"


def over(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested dictionary of settings with those of another one in place of its own."""
    return tree | {section: tree.get(section, {}) | values for section, values in changes.items()}


def flat(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings by section.name."""
    return {f"{section}.{name}": value for section, own in settings.items() for name, value in own.items()}


def differing(one: dict[str, Any], another: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two of them, by section.name, do not have in common."""
    return {key: (one.get(key), another.get(key)) for key in {**one, **another} if one.get(key) != another.get(key)}


def stage_table(entry: Any, number: int) -> dict[str, Any]:
    """The entry of train.stages with that number as tables of sections, and its name: what a recipe says written out.

    So that another version of srft goes on with the same. Raises UserError for what is no stage.
    """
    where = f"train.stages[{number}]: "
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        raise UserError(f'{where}not a table in TOML, whose texts are in quotes: {{recipe = "sft"}}; found {entry}')
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UserError(f"{where}expected the name of a recipe or a table of settings, found {entry!r}")
    for key in ("name", "recipe"):
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{where}{key}: expected text, found {entry[key]!r}")
    own = {key: value for key, value in entry.items() if key not in ("name", "recipe")}
    try:
        recipe = read_recipe(entry["recipe"]) if "recipe" in entry else {}
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    if recipe.get("train", {}).pop("stages", None):
        raise UserError(f"{where}recipe {entry['recipe']!r} has stages itself; name those")
    for key in [*check_keys(own, where), *check_keys(recipe, where)]:
        if key.partition(".")[0] not in OF_STAGES or key in OF_THE_RUN:
            raise UserError(f"{where}{key} is the same in all of a run; a stage sets {', '.join(OF_STAGES)}")
    preset = own.get("loss", {}).get("preset")
    name = entry.get("name") or entry.get("recipe") or (preset if isinstance(preset, str) else f"stage {number}")
    return {"name": name, **over(recipe, own)}


def recipes() -> dict[str, str]:
    """The recipes that come with srft, and what the first line of each says of it."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(RECIPES.glob("*.toml"))
    }


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe; raises UserError for an unknown one."""
    known = recipes()
    if name not in known:
        hint = "; a file is the first argument, without --recipe" if name.endswith(".toml") else nearest(name, known)
        raise UserError(f"recipe {name!r} is not known{hint} (recipes: {', '.join(known)})")
    return read_toml(str(RECIPES / f"{name}.toml"))


def toml_loads(text: str) -> dict[str, Any]:
    """tomllib.loads, also on Python 3.10; raises ValueError for invalid TOML."""
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise missing("tomli", "reading TOML on Python 3.10") from error
    return tomllib.loads(text)


def read_toml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from error
    try:
        return toml_loads(text)
    except ValueError as error:
        line = re.search(r"line (\d+)", str(error))
        raise UserError(f"{path}:{line[1] if line else len(text.splitlines())}: not valid TOML: {error}") from error


def fields_of(section: str) -> dict[str, dataclasses.Field]:
    return {each.name: each for each in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}


def default_of(each: dataclasses.Field) -> Any:
    return each.default_factory() if each.default is dataclasses.MISSING else each.default


def type_of(key: str) -> Any:
    section, name = key.split(".")
    return typing.get_type_hints(SECTIONS[section])[name]


def check_key(key: str, where: str) -> None:
    """Raise a UserError when `key` (section.name, perhaps more) is unknown.

    It names the key that was meant, be it in another trainer's words, or else the nearest.
    """
    section, name = [*key.split("."), ""][:2]
    if name in fields_of(section):
        return
    everything = [f"{section}.{name}" for section in SECTIONS for name in fields_of(section)]
    by_name = [known for known in everything if known.endswith(f".{key.rpartition('.')[2]}")]
    same_name = f"; did you mean {' or '.join(map(repr, by_name))}?" if by_name else ""
    hint = meant(key, everything) or same_name or nearest(key, everything)
    raise UserError(f"{where or 'command line: '}unknown key {key!r}{hint} (`srft train --help` lists all keys)")


def pairs(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`--a.b 1 2 --c.d=3` → ("a.b", ["1", "2"]), ("c.d", ["3"])."""
    starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")] + [len(arguments)]
    if starts[0] > 0:
        raise UserError(f"unexpected argument {arguments[0]!r}: settings are written --section.key value")
    for start, end in itertools.pairwise(starts):
        key, equals, value = arguments[start][2:].partition("=")
        yield key, [value] * bool(equals) + arguments[start + 1 : end]


def override(tree: dict[str, Any], key: str, values: list[str]) -> None:
    """Put one command-line setting into the tree that came from TOML."""
    section, name, *inner = [*key.split("."), ""][: max(2, key.count(".") + 1)]
    check_key(key, "")
    kind, table = type_of(f"{section}.{name}"), tree.setdefault(section, {})
    if kind is bool and not values:
        values = ["true"]
    if inner and typing.get_origin(kind) is not dict:
        what = "a list" if typing.get_origin(kind) is list else "one value"
        raise UserError(f"--{key}: {section}.{name} is {what} and has no keys of its own")
    if typing.get_origin(kind) is list or (len(values) > 1 and list in map(typing.get_origin, typing.get_args(kind))):
        if not values:
            raise UserError(f"--{key}: expected one value at least, found none; an empty list is []")
        listed = literal(values[0]) if len(values) == 1 and values[0].startswith("[") else None
        table[name] = listed if isinstance(listed, list) else [literal(v) if v.startswith("{") else v for v in values]
        return
    if len(values) != 1:
        raise UserError(f"--{key}: expected one value, found {' '.join(values) or 'none'}")
    if typing.get_origin(kind) is dict and inner:
        table = table.setdefault(name, fields_of(section)[name].default_factory())
        for name in inner[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UserError(f"--{key}: {name} already is the value {table!r}, not a table")
        name = inner[-1]
    table[name] = literal(values[0]) if typing.get_origin(kind) is dict else values[0]


def literal(text: str) -> Any:
    """The value that `text` is in TOML, or a number or truth in other words (.5, False, off), else the text itself."""
    try:
        return toml_loads(f"value = {text}")["value"]
    except ValueError:
        pass
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if re.fullmatch(r"[-+]?(\d+\.|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    return words.get(text.lower(), text)


def build(tree: dict[str, Any]) -> Config:
    """Check the types of a nested dictionary and make a Config of it; texts become numbers where those are expected."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise missing("jsonargparse", "reading a configuration") from error
    from argparse import ArgumentError

    parser = ArgumentParser(exit_on_error=False)
    for section in SECTIONS:
        for name, each in fields_of(section).items():
            parser.add_argument(f"--{section}.{name}", type=type_of(f"{section}.{name}"), default=default_of(each))
    try:
        values = parser.parse_object(copy.deepcopy(tree)).as_dict()  # it writes into what it is given
    except ArgumentError as error:
        key = re.search(r'key "(\w+\.\w+)', str(error))
        if not key:
            raise UserError(str(error)) from error
        section, name = key[1].split(".")
        raise UserError(f"{key[1]}: expected {words(type_of(key[1]))}, found {tree[section][name]!r}") from error
    for section, given in tree.items():  # jsonargparse reads texts within tables as YAML: "off" would be false
        holds_tables = [name for name in given if type_of(f"{section}.{name}") in (dict[str, Any], Tables)]
        values[section] |= {name: given[name] for name in holds_tables if not isinstance(given[name], str)}
    return Config(**{section: SECTIONS[section](**values[section]) for section in SECTIONS})


def words(kind: Any) -> str:
    """A type as users read it."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return "a list of numbers" if item is float else f"a list of texts{' or tables' * (item is not str)}"
    if list in map(typing.get_origin, typing.get_args(kind)):
        return "text or a list of texts"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "a table" if typing.get_origin(kind) is dict else "text")


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load` reads back to an equal one; what is None stays a comment."""
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for name, each in fields_of(section).items():
            value = getattr(getattr(config, section), name)
            line = f"# {name} =" if value is None else f"{name} = {toml_value(value)}"
            lines.append(f"{line:<44}  # {each.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        named = {
            key if re.fullmatch(r"[\w-]+", key, re.ASCII) else toml_value(key): value[key] for key in map(str, value)
        }
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in named.items() if each is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON lets DEL through, TOML does not
    return repr(value)


def help_text() -> str:
    """All sections, keys, defaults and what they mean."""
    lines = []
    for section in SECTIONS:
        lines.append(f"\n[{section}]")
        for name, each in fields_of(section).items():
            key, default, help = f"{section}.{name}", default_of(each), each.metadata["help"]
            choices = typing.get_args(type_of(key)) if typing.get_origin(type_of(key)) is Literal else ()
            if not all(choice in help for choice in choices):
                help += f": {', '.join(choices)}"
            lines.append(f"  --{key:<30} {help}" + ("" if default is None else f" (default {toml_value(default)})"))
    return "\n".join(lines)
