"""What users call: names, parameters and defaults, against the list in public_face.txt. A change of it is a decision:
then `python -m tests.srft_kernels.test_public_face > tests/srft_kernels/public_face.txt`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

import srft_kernels as sk
from srft_kernels.call import Arguments, HeadArguments
from srft_kernels.distillation.engine import DistillationArguments

LIST = Path(__file__).with_name("public_face.txt")


def face() -> Iterator[str]:
    for name in sorted(sk.__all__):
        value = getattr(sk, name)
        if inspect.ismodule(value):
            yield f"{name}: module"
        elif is_dataclass(value):
            shown = ", ".join(
                f"{field.name}: {field.type}" + ("" if field.default is MISSING else f" = {field.default!r}")
                for field in fields(value)
                if not field.name.startswith("_")
            )
            yield f"{name}({shown})"
        else:
            yield f"{name}{inspect.signature(value)}"


def test_the_public_face_is_the_one_that_is_written_down():
    assert list(face()) == LIST.read_text(encoding="utf-8").splitlines()


FUNCTIONS = {
    sk.linear_loss: Arguments,
    sk.linear_logprobs: Arguments,
    sk.linear_cross_entropy: Arguments,
    sk.linear_distillation: DistillationArguments,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_defaults_of_a_function_are_those_of_its_arguments(function):
    """Tests, the reference and operators make Arguments by themselves."""
    defaults = {field.name: field.default for field in fields(FUNCTIONS[function])}
    signature = inspect.signature(function).parameters
    shared = [name for name in signature if name in defaults and defaults[name] is not MISSING]
    assert {*(field.name for field in fields(HeadArguments))} - {"input", "linear_weight"} <= {*shared}
    for name in shared:
        if (function, name) not in ((sk.linear_cross_entropy, "reduction"), (sk.linear_loss, "objective")):
            assert signature[name].default == defaults[name], name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_what_does_not_fit_a_signature(function):
    """Python's own error, and one that knows what an option is called here."""
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) missing \d required positional arguments"):
        function(1)
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) takes \d positional arguments but 9 were given"):
        function(*range(9))
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got multiple values for argument 'input'"):
        function(*range(3), input=2)
    if function is not sk.linear_loss:
        rest = range(4 if "teacher_input" in inspect.signature(function).parameters else 3)
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) has no option soft_cap: here it is softcap"):
            function(*rest, soft_cap=1.0)
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) has no option xyz$"):
            function(*rest, xyz=1.0)


if __name__ == "__main__":
    print("\n".join(face()))
