"""Which option of a multiple-choice question a completion chooses, as models say it.

    chosen("So it reflects.\\n\\nThe answer is C.", ["the Moon", "the Sun", "a mirror"])      # "C"

What is said last counts: behind a mark, else a last line that is an option, else "the answer is", "C is right" and the
like, else a first line that is an option. It may be told by its letter, by its text, or by both if they agree.
"""

import re
import unicodedata
from collections.abc import Sequence

from srft.data.examples import LETTERS
from srft.data.marks import HASHES, last_box

UNSEEN = re.compile("[\\u200b-\\u200f\\ufeff\\ufe0f]")
COMMANDS = re.compile(r"\\(?:text|math|bold)\w*\s*\{([^{}]*)\}")  # of LaTeX, around a text
SIGNS = re.compile(r"\\(?:rm|bf|it|sf|tt)\b|\\[()\[\],;:! ]|[*`$~\\]|(?<!\w)_+|_+(?!\w)")
LONGEST = 300  # characters of what is read behind "the answer is"
AROUND = " \t\r\n.,;:!?\"'“”‘’«»()[]{}<>-–—→=>#•✅|。"
NAME = r"(?:answer(?: choice| key says)?|option|choice|letter(?: of the right option)?)"
SAID = r"(?:\s*(?:['’]s|\bis|\bwas|\b(?:would|will|must|should) be|[:=–—-]))*"
HEDGE = r"(?:\s+(?:therefore|thus|clearly|indeed|probably|most likely|likely|definitely|simply|option|choice|letter))*"
STATEMENT = re.compile(
    rf"\b{NAME}\b{SAID}{HEDGE}|\b(?:choose|chose|pick|select|go with)\b{HEDGE}|^\W*(?:so|therefore|thus|hence)\b[,:]?"
    r"|(?<=[.!?] )(?:so|therefore|thus|hence)\b[,:]?|\b(?:it['’]s|it is|it must be|that['’]s)\b"
    r"|答案(?:是|为)?:?|\b(?:ответ|respuesta(?: correcta)? es|antwort(?: ist| lautet)?|r[ée]ponse(?: est)?)\b:?",
    re.IGNORECASE | re.MULTILINE,
)
SHORT = re.compile(
    r"^\W*(?:so|therefore|thus|hence)\b|it|that", re.IGNORECASE
)  # statements of which a letter is the end
PREFIX = re.compile(rf"\W*(?:the\s+)?(?:(?:final|correct|right|best|my)\s+)*{NAME}\b{SAID}{HEDGE}\s*", re.IGNORECASE)
IS_RIGHT = re.compile(
    r"(?<![\w'’])[(\[]?([A-Z])[)\]]?(?:\s*\([^()]*\))?\s+(?:is|must be|seems)\s+(?:the\s+)?"
    r"(?:correct|right|best|answer)\b"
)
LABEL = re.compile(r"[\s\"'“”‘’(\[{<«→>•✅-]*([A-Z])(?![\w'’])([)\]}>\"'”’]*)(.*)", re.DOTALL)
JOINED = r"\s*(?:[,/&+;:.–-]|\band\b|\bor\b|\bnor\b|\s)\s*(?:option\s+)?[(\[]?[A-Z](?![\w'’])[)\]]?(?![)\]])"
ANOTHER = re.compile(
    JOINED + r"(?!\s+(?!(?:and|or|nor)\b)[a-z])"
)  # not of "C. A mirror reflects", nor of "C; D is wrong"
VERDICT = re.compile(r"^\W*([A-Z])\s*[.):]+\s*(?i:right|correct|yes|true)\W*$", re.MULTILINE)
GOES_ON = re.compile(r"\s+(?:is|because|since|as|for|and|or|nor|which|due|with|not|rather|but|if|at|by)\b")


def chosen(text: str, choices: Sequence[str]) -> str:
    """The letter of the option that a text chooses; "" where it chooses none, or several."""
    options = Options(choices)
    text = text.rpartition("</think>")[2]
    if (box := last_box(text)) is not None:
        return options.told(clean(box)) or ""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    if tagged:
        return options.told(clean(tagged[-1])) or ""
    _, mark, tail = text.rpartition(HASHES)
    if mark:
        first, _, rest = clean(tail).strip().partition("\n")
        found = options.told(first)
        return found if found is not None else options.said(rest) if rest.strip() else ""
    return options.said(clean(text))


def clean(text: str) -> str:
    """Without what LaTeX and Markdown write around a text; full-width letters are letters."""
    text = UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    for _ in range(3):
        text = COMMANDS.sub(r" \1 ", text)
    return SIGNS.sub(" ", text)


def plain(text: str) -> str:
    return " ".join(clean(text).split()).casefold().strip(AROUND)


class Options:
    """The options of a question, by their letters."""

    def __init__(self, choices: Sequence[str]):
        self.texts = dict(zip(LETTERS, map(plain, choices)))

    def of_text(self, text: str) -> list[str]:
        """The letters of the options that have this text."""
        return [letter for letter, own in self.texts.items() if own == plain(text)]

    def said(self, text: str) -> str:
        lines = [line for line in text.splitlines() if line.strip(AROUND)]
        if not lines:
            return ""
        if (last := self.line(lines[-1])) and not (lines[1:] and self.line(lines[-2]) not in (None, last)):
            return last
        stated = [(match.end(), match) for match in STATEMENT.finditer(text)]
        stated += [(match.start(1), match) for match in IS_RIGHT.finditer(text)]
        for end, match in sorted(stated, key=lambda each: -each[0]):
            letter = match[1] if match.re is IS_RIGHT else self.statement(match, text[end : end + LONGEST])
            if letter in ("", *self.texts):
                return letter
        if (first := self.line(lines[0])) and not (lines[1:] and self.line(lines[1])):
            return first
        verdicts = re.findall(
            r"^\W*([A-Z])\s*[.):]+\s*(?:right|correct|yes|true)\W*$", text, re.MULTILINE | re.IGNORECASE
        )
        return verdicts[0] if len(verdicts) == 1 and verdicts[0] in self.texts else ""

    def statement(self, match: re.Match, rest: str) -> str | None:
        """What is said behind "the answer is", on its line or the next; None where that is no option."""
        line, _, below = rest.partition("\n")
        if not line.strip(AROUND):
            line = below.lstrip().partition("\n")[0]
        if SHORT.match(match[0].strip()) and not self.line(line):
            return None
        return self.told(line)

    def line(self, line: str) -> str | None:
        """The letter of the option that a line is; None of one that is none."""
        bare = line.strip(AROUND)
        if len(bare) == 1 and bare.upper() in self.texts:
            return bare.upper()
        if len(letters := self.of_text(bare)) == 1:
            return letters[0]
        label = LABEL.match(line)
        if label and label[1] in self.texts and (label[2] or re.match(r"\s*[.:(–—-]", label[3])):
            own, rest = self.texts[label[1]], plain(label[3])
            reason = re.match(r"(?:because|since|as|for)\b", rest)
            if (reason or (own and rest.startswith(own))) and not re.search(r"\b[A-Z][.)](?=\s)", label[3]):
                return label[1]
        return self.behind(line)

    def behind(self, text: str) -> str | None:
        """The letter behind the text of its option: "the Sun (B)"."""
        both = re.fullmatch(r"(.+?)\s*[(\[]([A-Z])[)\]]\W*", text.strip())
        return both[2] if both and both[2] in self.of_text(both[1]) else None

    def told(self, text: str) -> str | None:
        """The option that a text begins with, by letter or text. "" for several; None where it names none."""
        text = next((line for line in text.splitlines() if line.strip(AROUND)), "")
        text = text[match.end() :] if (match := PREFIX.match(text)) else text
        bare = text.strip(AROUND)
        if len(bare) == 1 and bare.upper() in self.texts:
            return bare.upper()
        for said in (bare, re.split(r"[.!?](?:\s|$)", bare)[0]):
            if len(letters := self.of_text(said)) == 1:
                return letters[0]
        if small := re.match(r"\W*([a-z])\)\s+(.+)", text):
            return small[1].upper() if small[1].upper() in self.of_text(small[2]) else None
        label = LABEL.match(text)
        if not label or label[1] not in self.texts:
            return self.behind(text)
        letter, closed, rest = label.groups()
        if letter in "AI" and not closed and re.match(r"\s+[a-z]", rest) and not GOES_ON.match(rest):
            return None  # an article, or the one who speaks
        if letters := self.of_text(rest):
            return letter if letter in letters else ""
        others = [own for each, own in self.texts.items() if each != letter and own]
        apart = closed or re.match(r"\s*[.:(–—-]", rest)
        if apart and any(re.match(rf"{re.escape(own)}(?!\w)", plain(rest)) for own in others):
            own = self.texts[letter]
            return letter if own and plain(rest).startswith(own) else ""
        return "" if ANOTHER.match(rest) else letter
