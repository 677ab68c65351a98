"""From files and generated tasks to examples, and from examples to token ids."""

from srft.data.examples import Example, digest
from srft.data.files import digest_of_files, read_examples, rows_of
from srft.data.load import load_examples, load_sides
from srft.data.overlong import fit
from srft.data.prompts import Problem, Prompter, build_prompter

__all__ = [
    "Example",
    "Problem",
    "Prompter",
    "build_prompter",
    "digest",
    "digest_of_files",
    "fit",
    "load_examples",
    "load_sides",
    "read_examples",
    "rows_of",
]
