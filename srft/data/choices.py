"""Multiple-choice questions of files: the options that a row has, in an order of their own, as part of its prompt.

    MMLU, MMLU-Pro, ARC, CommonsenseQA, OpenBookQA    a list, or {text, label}, and which of them is right
    MMMLU, C-Eval                                     columns A, B, C, D, and the letter of the right one
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
KEYS = ("answerkey", "answer_index", "answer_idx", "answer_letter")  # say again which option is right, beside `answer`
LETTER = r"\(?[A-J]\)?"
# Options that other options, or their places, are part of. A false alarm keeps the order of the file, no more.
SPEAKS_OF_OTHERS = re.compile(
    r"(?i:\b(?:above|below|preceding|following|former|latter)\b)"
    r"|(?i:\b(?:all|none|both|neither|each|any|either)(?: of)?(?: the)?"
    r" (?:these|them|those|others?|options?|answers?|choices?|statements?|are|is)\b)"
    r"|(?i:\bthe (?:first|last|other)(?: two| three| one)\b)"
)
NAMES_LETTERS = re.compile(
    rf"\b{LETTER}\s*(?:,|&|/|\+|\band\b|\bor\b|\bnor\b)\s*{LETTER}(?!\w)"
    rf"|(?:^|\W){LETTER} only\b|(?i:\bonly) {LETTER}(?!\w)"
    rf"|(?i:\b(?:options?|choices?|answers?|same as|as in|both|either|neither)) (?:{LETTER}|\([a-j]\)|[1-9])(?!\w)"
)


@dataclass(frozen=True)
class Choices:
    """texts: the options.   right: the place of the right one.   unordered: their order in the file means nothing."""

    texts: list[str]
    right: int
    unordered: bool = False

    def shuffled(self, seed: int, question: str) -> "Choices":
        """Another order, of the seed and the question; that of the file where it means something, and for seed -1."""
        places = list(range(len(self.texts)))
        order = random.Random(f"{max(seed, 0)}/{question}").sample(places, len(places))
        speak = [place for place in places if SPEAKS_OF_OTHERS.search(self.texts[place])]
        if self.unordered:
            order = [place for place in order if place not in speak] + speak  # "all of the above" is the last
        elif seed < 0 or speak or any(map(NAMES_LETTERS.search, self.texts)):
            order = places
        return Choices([self.texts[place] for place in order], order.index(self.right), self.unordered)

    @property
    def letter(self) -> str:
        return LETTERS[self.right]

    def asked(self, question: str) -> str:
        """The question with its options, and what is to be answered."""
        return f"{question.rstrip()}\n\n{listed(self.texts)}\n\n{ASK}"

    def stand_in(self, question: str) -> bool:
        """Whether the question has the options in it already: each at the end of a line, or behind its letter."""
        at_ends = all(re.search(rf"{re.escape(text)}[\s.;,]*$", question, re.MULTILINE) for text in self.texts)
        lettered = zip(LETTERS, self.texts)
        return at_ends or all(
            re.search(rf"(?<!\w)\(?{a}[).:]\s*{re.escape(text)}(?!\w)", question) for a, text in lettered
        )


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


def choices_apart(row: dict) -> list[str]:
    """The columns of the options where each has its own: the right one first, or A, B, C, D; else none."""
    by_name = {str(name).lower(): name for name in row}
    right = next((by_name[name] for name in RIGHT if name in by_name), None)
    wrong = [name for lower, name in by_name.items() if WRONG.fullmatch(lower) and not is_blank(row[name])]
    if right and wrong:
        return [right, *wrong]
    there = [letter for letter in LETTERS if not is_blank(row.get(letter))]
    told = [str(row[by_name[name]]).strip() for name in ("answer", *KEYS) if name in by_name]
    alike = there[1:] and there == list(LETTERS[: len(there)]) and any(each in there for each in told)
    return there if alike and all(isinstance(row[name], (str, int, float)) for name in there) else []


def is_blank(value: Any) -> bool:
    """Nothing, as a table says it: None, NaN, or a text without any."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def choices_of(row: Row, column: str, key_column: str | None) -> Choices:
    """The options of a row, of which `column` has all or one, and which is right, as the column of the answer says.

    Raises UserError, with file and line, where that cannot be told.
    """
    options, labels, unordered = options_of(row, column)
    texts = [option(text, f"{row.source}: {name}") for name, text in options]
    where = f"{row.source}: {options[0][0] if options else column}"
    if not 2 <= len(texts) <= len(LETTERS):
        raise UserError(f"{where}: expected 2 to {len(LETTERS)} options, found {len(texts)}")
    if labels and (len(labels) != len(texts) or len(set(labels)) < len(labels)):
        raise UserError(f"{where}: expected a label for each of {len(texts)} options, found {shown(labels)}")
    labels = labels or list(LETTERS[: len(texts)])
    texts = without_labels(texts, labels)
    if unordered and any(map(NAMES_LETTERS.search, texts)):
        raise UserError(f"{where}: an option names another by its letter, and the options have no order")
    right = 0 if unordered else right_of(row, texts, labels, key_column)
    if texts.count(texts[right]) > 1:
        raise UserError(f"{where}: the right option {shown(texts[right])} is there twice")
    return Choices(texts, right, unordered)


def options_of(row: Row, column: str) -> tuple[list[tuple[str, Any]], list[str], bool]:
    """(column and value of each option, their labels if they have any, whether their order means nothing)."""
    apart = choices_apart(row.value)
    if column not in apart:
        texts, labels = texts_and_labels(row.value[column])
        return [(column, text) for text in texts or []], labels, False
    lettered = len(apart[0]) == 1
    return [(name, row.value[name]) for name in apart], apart if lettered else [], not lettered


def right_of(row: Row, texts: list[str], labels: list[str], key_column: str | None) -> int:
    """The place of the right option, which all columns that tell it have to agree on."""
    keys = [key_column, *(name for name in row.value if str(name).lower() in KEYS)]
    keys = [name for name in dict.fromkeys(keys) if not is_blank(row.value.get(name))]
    if not keys:
        raise UserError(f"{row.source}: options without the right one: a column answer, answerKey or answer_index")
    meant = [places_of(row.value[name], texts, labels) for name in keys]
    for name, places in zip(keys, meant):
        if not places:
            known = f"one of {', '.join(labels)}, a place from 0, or the text of an option"
            raise UserError(f"{row.source}: {name}: expected {known}, found {shown(row.value[name])}")
    agreed = set.intersection(*meant)
    told = " and ".join(f"{name} {shown(row.value[name])}" for name in keys)
    if len(agreed) != 1:
        found = "may be several options" if agreed else "are not the same option"
        raise UserError(f"{row.source}: {told} {found}; mend the row")
    return agreed.pop()


def places_of(key: Any, texts: list[str], labels: list[str]) -> set[int]:
    """The options that a key may mean: by label, "B" or "(b)" or "B. two", by place from 0, or by text."""
    if isinstance(key, bool) or not isinstance(key, (str, int, float)):
        return set()
    named = on_one_line(str(int(key) if isinstance(key, float) and key.is_integer() else key))
    found = {place for place, text in enumerate(texts) if text == named and isinstance(key, str)}
    for place, (label, text) in enumerate(zip(labels, texts)):
        behind = re.fullmatch(rf"\(?{re.escape(label)}(?:[).:]\s*(.*))?", named, re.IGNORECASE)
        if behind and (not behind[1] or behind[1] == text):
            found.add(place)
    by_place = named.isdecimal() and named not in labels and int(named) < len(texts)
    return found | ({int(named)} if by_place else set())


def without_labels(texts: list[str], labels: list[str]) -> list[str]:
    """Options that begin with their labels, "A) 21", without them: another letter may stand before them now."""
    own = [re.match(rf"\(?{re.escape(label)}[).:]\s*(?=\S)", text) for label, text in zip(labels, texts)]
    return [text[match.end() :] for text, match in zip(texts, own)] if all(own) else texts


def option(value: Any, where: str) -> str:
    """The text of an option, on one line."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_blank(value):
        value = str(value)
    if not isinstance(value, str) or is_blank(value):
        raise UserError(f"{where}: expected the text of an option, found {shown(value)}")
    return on_one_line(value)


def on_one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, text.splitlines())))
