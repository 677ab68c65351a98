"""How much one must read: files of a call's way, places that spell an option, sizes, and no guessing at objectives."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from srft_kernels.call import NUMBERS, Arguments

from .way_through import PACKAGE, entered

SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("backend, most", [("torch", 10), ("triton", 12)])
def test_files_that_a_call_enters(backend, most):
    if backend == "triton":
        pytest.importorskip("triton")
    entered(backend)  # what is looked up once and kept
    files = entered(backend)
    assert len(files) <= most, files


def test_files_that_spell_an_option():
    for name in ("softcap", "logit_scale"):
        files = [file for file, source in SOURCES.items() if re.search(rf"\b(teacher_)?{name}\b", source)]
        assert len(files) <= 7, (name, files)


def test_sizes():
    lines = {file: source.count("\n") for file, source in SOURCES.items()}
    assert max(lines.values()) <= 450, lines


def test_an_objective_is_asked_and_not_guessed_at():
    """What one may be asked is written down in Objective: nobody looks for an attribute that may not be there."""
    for file, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                assert "objective" not in ast.unparse(node.args[0]), f"{file}:{node.lineno}"


def test_every_tensor_of_a_call_has_its_shape_beside_it():
    """In the only list of options."""
    lines = dict(re.findall(r"^    (\w+): (?:float \| )?Tensor[^#\n]*(#.*)?$", SOURCES["call.py"], re.M))
    for field in fields(Arguments):
        if field.type.startswith("Tensor"):
            assert "(" in lines[field.name], field.name


def test_kinds_of_options():
    """They are told apart by the text of their types: what compiled calls pass as tensors, what ranks compare."""
    assert NUMBERS == (
        "temperature",
        "softcap",
        "logit_scale",
        "ignore_index",
        "vocab_size",
        "live_tokens",
        "reduction",
    )
    tensors = [field.name for field in fields(Arguments) if "Tensor" in field.type]
    assert tensors == ["input", "linear_weight", "linear_bias", "temperature", "target", "token_weight", "annotations",
                       "weight", "weight_grad"]  # fmt: skip


def test_the_page_names_every_room():
    page = (Path(PACKAGE).parent / "docs/how-it-works.md").read_text(encoding="utf-8")
    for file in SOURCES:
        name = Path(file).name
        if name != "__init__.py":
            assert re.search(rf"\b{re.escape(name)}\b|\b{re.escape(name.removesuffix('.py'))}\b", page), file
