"""Multiple-choice questions of files: the options that a row has, in an order of their own, as part of its prompt.

    MMLU, MMLU-Pro, ARC, CommonsenseQA, OpenBookQA    a list, or {text, label}, and which of them is right
    GPQA, SciQ                                        columns for the right one and for the wrong ones

Options are in the order that data.choice_seed and the question give them, so that no model is tested on the place of an
answer that it has seen. The order of the file stays where options speak of each other ("all of the above"), and where a
demonstration may name a letter. The answer of such an example is the letter of the right option.
"""

import ast
import contextlib
import random
import re
from dataclasses import dataclass
from typing import Any

from srft.data.chats import parsed, shown
from srft.data.examples import LETTERS, listed
from srft.data.rows import Row
from srft.errors import UserError

ASK = "Answer with the letter of the right option."
RIGHT, WRONG = ("correct answer", "correct_answer"), re.compile(r"(incorrect[ _]answer[ _]?|distractor)\d+")
# Options that other options, or their places, are part of.
SPEAKS_OF_OTHERS = re.compile(
    r"\b(above|below|preceding|following)\b|\b(all|none|both|neither|each|any) of (these|them|the (other|option))"
    r"|\b[A-J],? (and|or|nor) [A-J]\b|\boptions? [A-J]\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Choices:
    """texts: the options.   right: the place of the right one.   ordered: the order of the file means nothing."""

    texts: list[str]
    right: int
    ordered: bool = False

    def shuffled(self, seed: int, question: str) -> "Choices":
        if seed < 0 or (not self.ordered and any(map(SPEAKS_OF_OTHERS.search, self.texts))):
            return self
        order = random.Random(f"{seed}/{question}").sample(range(len(self.texts)), len(self.texts))
        return Choices([self.texts[place] for place in order], order.index(self.right), self.ordered)

    @property
    def letter(self) -> str:
        return LETTERS[self.right]

    def asked(self, question: str) -> str:
        """The question with its options, and what is to be answered."""
        return f"{question.rstrip()}\n\n{listed(self.texts)}\n\n{ASK}"


def are_choices(value: Any) -> bool:
    """Whether a column has options: a list of texts, or a table of them with labels."""
    texts, _ = texts_and_labels(value)
    return texts is not None


def texts_and_labels(value: Any) -> tuple[list[Any] | None, list[str]]:
    value = from_cell(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label")
        return value["text"], [str(each) for each in labels] if isinstance(labels, list) else []
    if isinstance(value, list) and value and all(isinstance(each, dict) and "text" in each for each in value):
        return [each["text"] for each in value], [str(each.get("label", "")) for each in value]
    if isinstance(value, list) and len(value) > 1 and not any(isinstance(each, (dict, list)) for each in value):
        return value, []
    return None, []


def from_cell(value: Any) -> Any:
    """A list or a table that a cell of a CSV has as JSON, or in Python's way of writing it."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    if (found := parsed(value)) is not None:
        return found
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(value.strip())
    return value


def choices_in_columns(row: Row) -> tuple[str, list[str]] | None:
    """The column of the right answer and those of the wrong ones, where a row has them so."""
    if not isinstance(row.value, dict):
        return None
    by_name = {str(name).lower(): name for name in row.value}
    right = next((by_name[name] for name in RIGHT if name in by_name), None)
    wrong = [name for lower, name in by_name.items() if WRONG.fullmatch(lower)]
    there = right and wrong and any(row.value[name] is not None for name in (right, *wrong))
    return (right, wrong) if there else None


def choices_of(row: Row, column: str, value: Any, key: Any, key_column: str | None) -> Choices:
    """The options of a row that has them in one column, and which the key says is right.

    Raises UserError, with file and line, where that cannot be told.
    """
    texts, labels = texts_and_labels(value)
    where = f"{row.source}: {column}"
    checked = [check_option(text, where) for text in texts or []]
    check_count(checked, where)
    if labels and (len(labels) != len(checked) or len(set(labels)) < len(labels)):
        raise UserError(f"{where}: expected a label for each of {len(checked)} options, found {shown(labels)}")
    labels = labels or list(LETTERS[: len(checked)])
    if key is None:
        raise UserError(f"{row.source}: options without the right one: a column answer, answerKey or answer_index")
    named = str(key).strip()
    at_place = [int(named)] if named.isdecimal() and int(named) < len(checked) else []
    as_text = [place for place, text in enumerate(checked) if text == named and isinstance(key, str)]
    meant = [labels.index(named)] if named in labels else {*at_place, *as_text}
    if len(meant) != 1 or isinstance(key, bool):
        known = f"one of {', '.join(labels)}, a place from 0, or the text of one option"
        raise UserError(f"{row.source}: {key_column}: expected {known}, found {shown(key)}")
    return checked_choices(checked, *meant, where)


def choices_from_columns(row: Row, right: str, wrong: list[str]) -> Choices:
    texts = [check_option(row.value[name], f"{row.source}: {name}") for name in (right, *wrong)]
    check_count(texts, f"{row.source}: {right}")
    return checked_choices(texts, 0, f"{row.source}: {right}", ordered=True)


def checked_choices(texts: list[str], right: int, where: str, ordered: bool = False) -> Choices:
    if texts.count(texts[right]) > 1:
        raise UserError(f"{where}: the right option {shown(texts[right])} is there twice")
    return Choices(texts, right, ordered)


def check_option(value: Any, where: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected the text of an option, found {shown(value)}")
    return value.strip()


def check_count(texts: list[str], where: str) -> None:
    if not 2 <= len(texts) <= len(LETTERS):
        raise UserError(f"{where}: expected 2 to {len(LETTERS)} options, found {len(texts)}")
