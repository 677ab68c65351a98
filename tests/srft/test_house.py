"""What keeps the trainer's house readable: sizes, names, options that are read, objectives that are asked."""

import ast
import dataclasses
import re
from pathlib import Path

from srft.settings import SECTIONS

ROOT = Path(__file__).parents[2]
SOURCES = {str(path.relative_to(ROOT / "srft")): path.read_text() for path in (ROOT / "srft").rglob("*.py")}


def test_sizes():
    lines = {file: source.count("\n") for file, source in SOURCES.items()}
    assert max(lines.values()) <= 450 and lines["trainer.py"] <= 320, lines


def test_objectives_are_asked_and_not_guessed_at():
    for file, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "getattr", "hasattr"):
                assert "objective" not in ast.unparse(node.args[0]), where
            if isinstance(node, ast.Compare):  # what is in a preset, its objective says
                compared = [ast.unparse(each) for each in (node.left, *node.comparators)]
                names = any("preset" in each for each in compared) and any(each[0] in "\"'" for each in compared)
                assert not names, where


def test_every_setting_is_read():
    code = "\n".join(source for file, source in SOURCES.items() if file != "config.py")
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            read = rf"\b(config|{section})\.({section}\.)?{field.name}\b"
            assert re.search(read, code), f"{section}.{field.name}"


def test_tests_have_the_name_of_their_module():
    for path in (ROOT / "tests/srft").rglob("test_*.py"):
        module = path.relative_to(ROOT / "tests/srft").with_name(path.name.removeprefix("test_"))
        assert str(module) in SOURCES or path.name == Path(__file__).name, path


def test_the_page_names_every_room():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    for file in SOURCES:
        if Path(file).stem not in ("__init__", "__main__"):
            assert re.search(rf"\b{Path(file).stem}(\.py)?\b", page), file
