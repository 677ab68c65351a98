"""The answer in a text: where it stands, whether a prompt asks for a mark before it, when two are the same.

final_answer("2 + 3 = 5\\n#### 5")                              # "5"
MarkRule("auto", "Answer after ####.").counted(prompt, "2 + 3 = 5, and", finished=False)       # None: no answer
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from srft.data.marks import BOXED, HASHES, inside_braces

DIGITS = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|\.\d+)"  # thousands may be parted by commas
PLAIN = re.compile(rf"[-+]?{DIGITS}(?:[eE][-+]?\d+)?")
WRITTEN = re.compile(r"(?<![\w.])[-+]?\d[\d,./:^]*")  # a number in a text, with what makes another one of it
LEADS = re.compile(r"(?:[^\W\d]|[\s\\'’])*(?:=|≈|:|\\approx|\bis\b)\s*")  # "x =", "The answer is", "Answer:"
SIGNED = re.compile(rf"([-+]?)\s*[$€£¥]?\s*([-+]?{DIGITS})(?!\d|\.\d)")
# Words that make another number of the one before them.
COUNTS = {
    *("dozen", "hundred", "thousand", "million", "billion", "trillion", "half", "halves", "third", "thirds", "quarter"),
    *("quarters", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "or", "and", "to"),
    *("plus", "minus", "times", "squared", "cubed"),
}
UNIT = re.compile(r"(?:[%°$€£¥]|per\b|\b(?:[^\W\d_]{2,}|[mglshLKCFV])(?:\^?[23]|[²³])?\b|/)+")
LATEX = (  # what is written around a number, or instead of a sign, without meaning
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"\\(?:text|textrm|textbf|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:displaystyle|left|right|quad|qquad|,|;|:|!| )", " "),
    (r"\\([%$])", r"\1"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", "°"),
    (r"</?s>|<\|[^|<>]*\|>|\*\*|`|~|\\\(|\\\)|\\\[|\\\]", " "),
)
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
    text = (text or "").strip()
    return Decimal(text.replace(",", "")) if PLAIN.fullmatch(text) else None


def final_answer(completion: str, numeric: bool = False) -> str:
    """What stands after the last "####", or in the last \\boxed{…}, else the whole text; stripped.

    numeric: of that, the number that the line behind the mark is, a unit left out, or without a mark the last number of
    the text. "" where that is none: "3/4" is not 3, and neither is "3 or 5".
    """
    _, mark, tail = completion.rpartition(HASHES)
    if not mark and (boxed := completion.rpartition(BOXED)[1:])[0]:
        mark, tail = boxed[0], inside_braces(boxed[1])
    if not numeric:
        return tail.strip()
    if mark:
        return alone(tail.strip().partition("\n")[0] if mark == HASHES else tail)
    numbers = [each.rstrip(",./:^") for each in WRITTEN.findall(tail)]
    return numbers[-1] if numbers and number(numbers[-1]) is not None else ""


def unwritten(text: str) -> str:
    """A text without what LaTeX, Markdown and chat templates write around an answer."""
    text = re.sub(r"(?<=\d)\s*(?:\{,\}|,\\!|\\!,|\\,)\s*(?=\d{3})", ",", text)  # LaTeX's thousands
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    return text.strip().strip("$").strip()


def alone(text: str) -> str:
    """The number that `text` is, with a unit and with a name or without; "" for anything else."""
    text = unwritten(text)
    if number(text) is not None:
        return text
    if lead := LEADS.match(text):
        text = text[lead.end() :].strip().strip("$").strip()
    found = SIGNED.match(text)
    if not found:
        return ""
    rest = text[found.end() :]
    parts = re.split(r"[\s.,;()\"'$]+", rest)
    glued = rest[:1].isalpha() and len(parts[0]) < 2 and parts[0] not in tuple("mgLhs")  # 3x is no three
    if glued or any(part.casefold() in COUNTS or not UNIT.fullmatch(part) for part in parts if part):
        return ""
    return found[1] + found[2] if not (found[1] and found[2][0] in "+-") else ""


def written_out(text: str) -> str:
    """A number with an exponent of ten as mathematics has it; to math-verify the e in 4.5e33 is Euler's number."""
    found = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})", unwritten(text))
    return rf"{found[1]} \times 10^{{{found[2]}}}" if found else text


def as_text(answer: str) -> str:
    """The answer in a text, to be compared as text: regardless of space, case and a full stop."""
    return " ".join(final_answer(answer).split()).casefold().rstrip(".")


def is_answer(reference: str | None) -> bool:
    """Whether there is something to compare with: an empty answer would reward who says nothing."""
    return reference is not None and as_text(reference) != ""


def same(completion: str, answer: str) -> bool:
    """The completion's answer is `answer`, as a number where that is one, else as text regardless of space and case."""
    reference = final_answer(answer)  # a solution may carry its own "####"
    wanted = number(reference)
    if wanted is None and not any(map(str.isalpha, unwritten(reference))):  # 3 PM is not 3, though $3 is
        wanted = number(alone(reference))
    if wanted is not None:
        return number(final_answer(completion, numeric=True)) == wanted
    return as_text(completion) == as_text(answer)
