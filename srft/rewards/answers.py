"""The answer in a text: where it stands, whether a prompt asks for a mark before it, when two are the same.

final_answer("2 + 3 = 5\\n#### 5")                              # "5"
MarkRule("auto", "Answer after ####.").counted(prompt, "2 + 3 = 5, and", finished=False)       # None: no answer
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")
HASHES, BOXED = "####", "\\boxed{"
ASKS_FOR_BOX = re.compile(r"\\boxed|\bboxed\b")
ASKS_FOR_HASHES = re.compile(r"(?<!#)####(?!#)")
HEADING = re.compile(r"^[ \t]*####[ \t]+(?!.*answer)[^\W\d].*$", re.MULTILINE | re.IGNORECASE)  # of Markdown


@dataclass(frozen=True)
class MarkRule:
    """Which part of a completion may hold its answer.

    mode: "required": what stands behind #### or in \\boxed{}; "any": without a mark the whole text, of which a number
    is the last one; "auto": the first where the prompt asks for a mark, else the second. In each of them a completion
    that was cut off before it came to a mark has no answer: the last number of half a thought is none.
    system_prompt: what the model is told before a prompt that has no system turn of its own.
    """

    mode: str = "auto"
    system_prompt: str | None = None

    def counted(self, prompt: str | list[dict[str, Any]], completion: str, finished: bool = True) -> str | None:
        """The completion, or its mark and what stands behind; None where nothing counts. prompt: a text or a chat."""
        asked = self.asked(prompt)
        if not asked and self.mode != "required":
            return completion if finished or any(mark in completion for mark in (HASHES, BOXED)) else None
        # A mark of the other kind is a given answer too: demonstrations often end in ####, whatever a prompt asks for.
        for mark in sorted((HASHES, BOXED), key=lambda each: each not in asked):
            _, found, tail = completion.rpartition(mark)
            if found:
                return mark + (tail if mark == HASHES else inside_braces(tail) + "}")
        return None

    def asked(self, prompt: str | list[dict[str, Any]]) -> set[str]:
        """The marks that this prompt, or the system prompt before it, asks for, where that matters."""
        if self.mode != "auto":
            return set()
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        texts = [str(turn.get("content") or "") for turn in chat if turn.get("role") != "assistant"]
        if self.system_prompt and not (chat and chat[0].get("role") == "system"):
            texts.append(self.system_prompt)
        text = "\n".join(texts)
        asked = {BOXED} if ASKS_FOR_BOX.search(text) else set()
        return asked | ({HASHES} if ASKS_FOR_HASHES.search(HEADING.sub("", text)) else set())


def number(text: str | None) -> Decimal | None:
    """The number that `text` is, thousands separated by commas or not; None when it is none."""
    try:
        return Decimal(text.strip().replace(",", "")) if text else None
    except InvalidOperation:
        return None


def final_answer(completion: str, numeric: bool = False) -> str:
    """What stands after the last "####", or in the last \\boxed{…}, else the whole text; stripped.

    numeric: of that, the first number after the mark, or without a mark the last number of the text ("" if none).
    """
    _, mark, tail = completion.rpartition(HASHES)
    if not mark and (boxed := completion.rpartition(BOXED)[1:])[0]:
        mark, tail = boxed[0], inside_braces(boxed[1])
    if not numeric:
        return tail.strip()
    numbers = NUMBER.findall(tail)
    return numbers[0 if mark else -1] if numbers else ""


def inside_braces(text: str) -> str:
    """`text` up to the brace that closes the one before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text


def as_text(answer: str) -> str:
    """The answer in a text, to be compared as text: regardless of space, case and a full stop."""
    return " ".join(final_answer(answer).split()).casefold().rstrip(".")


def is_answer(reference: str | None) -> bool:
    """Whether there is something to compare with: an empty answer would reward who says nothing."""
    return reference is not None and as_text(reference) != ""


def same(completion: str, answer: str) -> bool:
    """The completion's answer is `answer`, as a number where that is one, else as text regardless of space and case."""
    wanted = number(final_answer(answer))  # a reference solution may carry its own "####"
    if wanted is not None:
        return number(final_answer(completion, numeric=True)) == wanted
    return as_text(completion) == as_text(answer)
