"""The marks behind which an answer stands in a text: "#### 5", and \\boxed{5}."""

import re

HASHES, BOXED = "####", "\\boxed{"
BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?<=\s)(\w))")  # with braces, or around one character


def inside_braces(text: str) -> str:
    """`text` up to the brace that closes the one before it; all of it where none does."""
    end = closing(text)
    return text if end < 0 else text[:end]


def closing(text: str) -> int:
    """The place of the brace that closes the one before `text`, or -1. \\{ and \\} are no braces."""
    depth, index = 1, 0
    while index < len(text):
        if text[index] == "\\":
            index += 1
        else:
            depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return index
        index += 1
    return -1


def last_box(text: str) -> str | None:
    """What is in the last closed box of a text, \\boxed{5}, \\fbox{5} or \\boxed 5; None where there is none."""
    for match in list(BOX.finditer(text))[:-17:-1]:  # a text full of open ones is not read for each
        if match[1]:
            return match[1]
        if (end := closing(text[match.end() :])) >= 0:
            return text[match.end() : match.end() + end].strip()
    return None
