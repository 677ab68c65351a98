"""Which option of a multiple-choice question a completion chooses, as models say it.

    chosen("So it reflects.\n\nThe answer is C.", ["the Moon", "the Sun", "a mirror"])      # "C"

In this order: what is behind a mark; a last line that is a letter; the last "the answer is" or "C is right"; a last
line that is an option; "I choose C" and the like; a first line that is an option. An option may be told by its letter,
by its text, or by both if they agree. What is denied or only supposed ("if A is correct", "I would not choose D") says
nothing.
"""

import re
import unicodedata
from collections.abc import Sequence

from srft.data.examples import LETTERS
from srft.data.marks import HASHES, last_box

UNSEEN = re.compile("[\\u200b-\\u200f\\ufeff\\ufe0f]")
COMMANDS = re.compile(r"\\(?:text|math|bold)\w*\s*\{([^{}]*)\}")  # of LaTeX, around a text
SIGNS = re.compile(r"\\(?:rm|bf|it|sf|tt)\b|\\[()\[\],;:! ]|[*`$~\\]|(?<!\w)_+|_+(?!\w)")
LONGEST = 300  # characters that are read behind and before "the answer is"
MOST = 50  # statements that are looked at, from the last
AROUND = " \t\r\n.,;:!?\"'“”‘’«»()[]{}<>-–—→=>#•✅|。"
NAME = r"(?:answer(?: choice| key)?|option|choice|letter|response|statement)"
OF = r"(?:\s+(?:to|from|among|of|for|in|that|best)\b[^.:\n]{0,60}?)?"
IS = r"(?:\s*(?:['’]s|\bis|\bwas|\bsays|\b(?:would|will|must|should|seems to|appears to)(?: \w+)? be|[:=–—-]))"
HEDGE = (
    r"(?:\s+(?:therefore|thus|clearly|indeed|probably|most likely|likely|definitely|simply|actually|option|choice"
    r"|letter))*"
)
STRONG = re.compile(
    rf"\b(?:correct|right|best|final|true)\s+{NAME}\b(?:{OF}{IS}+|){HEDGE}"
    rf"|\b(?:answer(?: choice| key)?|option that)\b{OF}{IS}+{HEDGE}|^\W*{NAME}\b\s*$"
    r"|答案(?:是|为)?:?|\b(?:ответ|respuesta(?: correcta)? es|antwort(?: ist| lautet)?|r[ée]ponse(?: est)?)\b:?",
    re.IGNORECASE | re.MULTILINE,
)
START = r"(?:^\W*|(?<=[.!?] ))(?:(?:so|therefore|thus|hence)\b[,:]?\s*)?"
WEAK = re.compile(
    rf"\b(?:choose|chose|pick|select|go with|going with|opt for|would say|answer)\b(?:\s+the)?{HEDGE}"
    rf"|{START}{NAME}\b{IS}*{HEDGE}|(?:^\W*|(?<=[.!?] ))(?:so|therefore|thus|hence)\b[,:]?"
    r"|\b(?:it['’]s|it is|it must be|that['’]s)\b",
    re.IGNORECASE | re.MULTILINE,
)
PREFIX = re.compile(
    rf"\W*(?:the\s+)?(?:(?:final|correct|right|best|my)\s+)*{NAME}\b(?:{OF}{IS}+|){HEDGE}\s*", re.IGNORECASE
)
IS_RIGHT = re.compile(
    r"(?<![\w'’])[(\[]?([A-Z])[)\]]?(?:\s*\([^()]*\))?\s+(?:is|must be|seems)\s+(?:the\s+)?"
    r"(?:(?:most \w+|only)\s+)?(?:correct|right|best|answer)\b"
)
# In the clause before: what follows is denied, or only supposed. "A and" before another letter: several are meant.
DENIED = re.compile(
    r"(?i:\b(?:not|cannot|if|whether|while|neither|both|unless|might|some|many|although|though|suppose|maybe|perhaps)\b)"
    r"|n['’]t\b"
    r"|[A-Z]\)?\s+(?:and|or|nor)\s*\(?$",
)
WRONG = re.compile(
    r"[)\]\s]*(?:\([^()]*\)\s*)?(?:is|was|are|would be|seems)\s+(?:\w+\s+){0,2}?(?:wrong|incorrect|false|not)\b"
)
# Behind the letter of a weak statement: the end of the sentence, or why.
ENOUGH = re.compile(
    r"[)\]}\"'”’*]*\s*(?:$|[.!;,]|\n|\(|is\b|because\b|since\b|as\b|over\b|rather\b|instead\b|and not\b|[–—-])",
    re.IGNORECASE,
)
LABEL = re.compile(r"[\s\"'“”‘’(\[{<«→>•✅-]*([A-Z])(?![\w'’])([)\]}>\"'”’]*)(.*)", re.DOTALL)
JOINED = (
    r"\s*(?:[,/&+;:.–-]|\band\b|\bor\b|\bnor\b|\s)\s*(?:(?:option|maybe|possibly|perhaps|even)\s+)?"
    r"[(\[]?[A-Z](?![\w'’])[)\]]?(?![)\]])"
)
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
        """The option that a text without marks chooses."""
        lines = [line for line in text.splitlines() if line.strip(AROUND)]
        if not lines:
            return ""
        if len(bare := lines[-1].strip(AROUND)) == 1 and bare.upper() in self.texts:
            return bare.upper()
        if (letter := self.stated(text, STRONG, IS_RIGHT)) is not None:
            return letter
        if (last := self.line(lines[-1])) and not (lines[1:] and self.line(lines[-2]) not in (None, last)):
            return last
        if (letter := self.stated(text, WEAK)) is not None:
            return letter
        if (first := self.line(lines[0])) and not (lines[1:] and self.line(lines[1])):
            return first
        verdicts = VERDICT.findall(text)
        return verdicts[0] if len(verdicts) == 1 and verdicts[0] in self.texts else ""

    def stated(self, text: str, *patterns: re.Pattern) -> str | None:
        """What the last of the statements says; "" if that is several options; None where none says any.

        Of weak ones all have to agree: who goes through the options names each of them.
        """
        found: dict[int, str] = {}
        for pattern in patterns:
            for match in pattern.finditer(text):
                clause = re.split(r"[.!?;,\n]", text[max(0, match.start() - LONGEST) : match.start()])[-1]
                letter = None if DENIED.search(clause) else self.statement(match, text)
                if letter in ("", *self.texts):
                    found[match.end()] = letter
                if len(found) > MOST:
                    del found[min(found)]
        if WEAK in patterns and len(set(found.values())) > 1:
            return ""
        return found[max(found)] if found else None

    def statement(self, match: re.Match, text: str) -> str | None:
        """What is said behind "the answer is", on its line or the next; None where that is no option."""
        rest = text[match.end() : match.end() + LONGEST]
        if match.re is IS_RIGHT:
            return match[1] if match[1] in self.texts else None
        line, _, below = rest.partition("\n")
        if not line.strip(AROUND):
            line = below.lstrip().partition("\n")[0]
        if (but := re.match(r"\s*not \(?[A-Z]\)? but\b", line)) and match.re is STRONG:
            line = line[but.end() :]
        label = LABEL.match(line)
        if label and WRONG.match(label[2] + label[3]):
            return None
        if match.re is WEAK and (not label or not ENOUGH.match(label[2] + label[3])) and not self.line(line):
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
            behind = rest[len(own) :] if own and rest.startswith(own) else ""
            denied = re.search(r"\b[A-Z][.)](?=\s)", label[3]) or re.match(
                r"\W*(?:is|are|was)\b.*\b(?:wrong|incorrect|false|not)\b", behind
            )
            if (reason or (own and rest.startswith(own))) and not denied:
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
