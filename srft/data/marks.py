"""The marks behind which an answer stands in a text: "#### 5", and \\boxed{5}."""

import re

HASHES, BOXED = "####", "\\boxed{"
BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{| +([A-Z]|\d+)(?!\w))")  # around a number or a letter it may have no braces


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
    """What is in the last closed box of a text, \\boxed{5}, \\fbox{5} or \\boxed 5; None where there is none.

    An empty one counts only where all are.
    """
    found = None
    for match in list(BOX.finditer(text))[:-17:-1]:  # a text full of open ones is not read for each
        end = closing(text[match.end() :])
        inside = match[1] or (text[match.end() : match.end() + end].strip() if end >= 0 else None)
        if inside:
            return inside
        found = inside if found is None else found
    return found
