"""What keeps the trainer's house readable: sizes, names, options that are read, objectives that are asked."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

from srft.settings import SECTIONS

ROOT = Path(__file__).parents[2]
SOURCES = {str(path.relative_to(ROOT / "srft")): path.read_text() for path in (ROOT / "srft").rglob("*.py")}


def test_sizes():
    lines = {file: source.count("\n") for file, source in SOURCES.items()}
    assert max(lines.values()) <= 450 and lines["trainer.py"] <= 320, lines


GUESSES = ("isinstance", "getattr", "hasattr", "type")


def test_objectives_are_asked_and_not_guessed_at():
    """Neither by their type nor by the name of their preset, which only messages tell."""
    for file, source in SOURCES.items():
        tree = ast.parse(source)
        told = {id(each) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in ast.walk(node)}
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in GUESSES:
                assert "objective" not in ast.unparse(node.args[0]), where
            if isinstance(node, ast.Attribute) and node.attr == "preset" and file != "learn/objective.py":
                assert id(node) in told, where


def test_every_setting_is_read():
    """As section.name, or as config.name in a file that knows the section's class."""
    read = {
        (file, ast.unparse(node.value).split(".")[-1], node.attr)
        for file, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
    }
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            here = {file for file, owner, name in read if name == field.name and owner == section}
            here |= {
                file
                for file, owner, name in read
                if name == field.name and owner in ("config", "data") and kind.__name__ in SOURCES[file]
            }
            assert here - {"config.py"}, f"{section}.{field.name}"


def test_tests_have_the_name_of_their_module():
    for path in (ROOT / "tests/srft").rglob("test_*.py"):
        module = path.relative_to(ROOT / "tests/srft").with_name(path.name.removeprefix("test_"))
        assert str(module) in SOURCES or path.name == Path(__file__).name, path


def test_the_page_names_every_room():
    section = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## The rooms")[2]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    for file in SOURCES:
        folder, _, name = file.rpartition("/")
        if name not in ("__init__.py", "__main__.py"):
            named = [f"`{folder}/`" in line and f"`{name}`" in line for line in lines]
            assert any(named) if folder else any(f"`{name}`" in line.split("|")[1] for line in lines), file


def test_the_loop_imports_with_torch_and_transformers_alone():
    optional = "reasoning_gym math_verify pyarrow tensorboard jsonargparse matplotlib gguf vllm"
    code = (
        f"import sys\nfor name in {optional.split()!r}: sys.modules[name] = None\n"
        "import srft.config, srft.trainer, srft.learn.packing, srft.learn.credit, srft.evaluate, srft.report\n"
        "assert 'srft.ranks.torchrun' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
