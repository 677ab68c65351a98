"""Which columns of a row are its prompt, its demonstration and its answer, and the examples that the row makes.

`ALIASES` says by which names they are known, in any case of letters. Names of one group are alike, and a row that has
two of them is refused; an earlier group comes before a later one. `data.columns` overrules all of it:
{demonstration = "solution"}.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from srft.data.chats import is_more_than_text, role_of, shown, text_of, to_chat, to_tools, unpacked
from srft.data.choices import are_choices, choices_apart, choices_of, from_cell
from srft.data.examples import RESERVED, Example, Turn
from srft.data.marks import HASHES, last_box
from srft.data.rows import Row
from srft.errors import UserError, nearest

CHOICES = ("choices", "options")
ALIASES: dict[str, list[tuple[str, ...]]] = {
    "messages": [("messages",), ("conversations", "conversation")],  # OpenAI, ShareGPT
    "prompt": [
        ("prompt",),  # TRL
        ("question", "problem", "instruction", "query"),  # GSM8K, OpenR1, Alpaca
        ("input",),
        ("question_stem",),  # OpenBookQA
    ],
    "demonstration": [
        ("demonstration",),
        ("completion",),  # TRL
        ("generations",),  # OpenR1: the first that it calls right
        ("solution", "output", "response", "r1_solution_1", "target"),  # MATH, Alpaca, OpenOrca, DeepMath, LUFFY
        ("extra_info.answer",),  # verl's GSM8K
    ],
    "answer": [
        ("answer",),
        ("final_answer", "ground_truth", "reward_model.ground_truth"),  # DeepMath, OlympiadBench, verl
        ("answerkey", "correct answer", "correct_answer"),  # ARC, GPQA, SciQ
        ("answer_index",),  # MMLU-Pro, beside answer
    ],
    "choices": [CHOICES],  # ARC, MMLU, MMLU-Pro; GPQA has a column for each
    "system": [("system", "system_prompt")],
    "tools": [("tools",), ("functions",)],  # the latter in older chats of OpenAI
}
OWN = ("prompt", "messages", "demonstration", "answer")  # reward functions get these in their own form, or not at all
MORE = ("input", "context")  # what an instruction is done to, in Alpaca and in Dolly
# What a question may need and its column does not say; an example without it would be another one.
UNSAID = (
    "choices",
    "options",
    "context",
    "passage",
    "article",
    "premise",
    "paragraph",
    "story",
    "history",
    "input",
    "body",
)
UNSEEN = ("image", "images", "video", "videos", "audio", "audios")
IMAGE = re.compile(r"image[ _]?\d+")
VERDICTS = ("correctness_math_verify", "correctness_llama")  # OpenR1's, one for each of its generations


def known_names() -> str:
    """ALIASES as a table: > before what comes after, | between what is alike."""
    lines = [f"  {name:<15}{' > '.join(' | '.join(group) for group in groups)}" for name, groups in ALIASES.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Columns:
    """named: data.columns, from what is wanted to the column that is it; "" for none.

    turns: data.turns.   choice_seed: data.choice_seed.
    """

    named: dict[str, Any] = field(default_factory=dict)
    turns: str = "last"
    choice_seed: int = 0

    def __post_init__(self) -> None:
        for name, column in self.named.items():
            if not isinstance(column, str):
                raise UserError(f"data.columns.{name}: expected the name of a column, found {column!r}")
            if name not in ALIASES and (name not in RESERVED or column):
                known = f"{', '.join(ALIASES)} can be named"
                raise UserError(f"data.columns.{name}: not a part of an example{nearest(name, ALIASES)}; {known}")

    def taken(self, row: Row) -> dict[str, str]:
        """Which column of the row is what, such as {"prompt": "question"}.

        Raises UserError, with file and line, where two could be the same, where there is no prompt, for a broken row.
        """
        if isinstance(row.value, UserError):
            raise row.value
        if not isinstance(row.value, dict):
            raise UserError(f"{row.source}: expected an object with named columns, found {type(row.value).__name__}")
        for name in RESERVED:
            if name in row.value and name not in self.named:
                raise UserError(
                    f"{row.source}: the column {name!r} has a name that reward functions know for something else; "
                    f'rename it, or leave it out: data.columns = {{{name} = ""}}'
                )
        found: dict[str, str] = {}
        for name, groups in ALIASES.items():
            speaks = chat_that_answers(row.value, found)
            if name == "demonstration" and speaks and name not in self.named:
                groups = groups[:2]  # the chat tells its own solution: a weaker name means something else
            beside = "messages" in found if name == "prompt" else self.named.get("prompt") and name not in self.named
            if name in ("prompt", "messages") and beside:
                continue
            if name == "messages" and not self.named and spelled(row.value, "problem") and rated(row.value):
                continue  # OpenR1's chat holds one of its generations, right or wrong
            if name == "choices" and not self.may_have_choices(found):
                continue
            if column := self.pick(row, name, groups):
                found[name] = column
        if (
            (apart := choices_apart(row.value))
            and "choices" not in {*found, *self.named}
            and self.may_have_choices(found)
        ):
            found["choices"] = apart[-1]
            if len(apart[0]) > 1:
                found["answer"] = apart[0]
        if "prompt" not in found and "messages" not in found:
            raise self.promptless(row)
        if not {"prompt", "messages"} & self.named.keys():
            check_whole(row, found, self.named.get("choices") == "")
        speaks = chat_that_answers(row.value, found)
        if speaks and "demonstration" in found:
            raise UserError(
                f"{row.source}: {speaks} end in an assistant turn and there is a {found['demonstration']} too; "
                "keep one of them"
            )
        solved = worked(look_up(row.value, found.get("answer")))
        if speaks and not self.told_nothing:
            found["demonstration"] = speaks
        elif solved and "demonstration" not in {*found, *self.named}:
            found["demonstration"] = found["answer"]
        if "answer" not in self.named and found.get("answer") == found.get("demonstration") and not solved:
            found.pop("answer", None)  # data.columns says that it is a solution, and no mark tells the answer in it
        solution, answer = found.get("demonstration", ""), look_up(row.value, found.get("answer"))
        unknown = "answer" not in self.named and (answer is None or answer != answer or not str(answer).strip())
        if unknown and solution.lower() == "solution" and final(row.value[solution]):
            found["answer"] = solution  # MATH's and Minerva's: in its last box
        return found

    def may_have_choices(self, found: dict[str, str]) -> bool:
        """Not where something is called a prompt, by the file or by data.columns: that is the whole of it."""
        whole = found.get("prompt") in (None, *OWN) or {"prompt", "messages"} & self.named.keys()
        return bool(self.named.get("choices")) or not whole

    def promptless(self, row: Row) -> UserError:
        """The error for a row without a prompt."""
        wanted = [self.named[name] for name in ("prompt", "messages") if self.named.get(name)]
        columns = [str(each) for each in row.value]
        names = [alias for name in ("messages", "prompt") for group in ALIASES[name] for alias in group]
        unfit = [each for each in (spelled(row.value, alias) for alias in names) if each in row.value]
        if unfit and not wanted and row.value[unfit[0]] is not None:
            return UserError(f"{row.source}: {unfit[0]}: expected text or a chat, found {shown(row.value[unfit[0]])}")
        advice = nearest(wanted[0], columns) if wanted else ""
        if spelled(row.value, "chosen") in row.value:
            advice = '; of preference data only the chosen can be imitated: data.columns = {messages = "chosen"}'
        return UserError(
            f"{row.source}: the column {' or '.join(map(repr, wanted or ('prompt', 'messages')))} is missing"
            f"{advice}; found columns: {', '.join(columns) or 'none'}"
        )

    @property
    def told_nothing(self) -> bool:
        """Whether data.columns says that nothing is to be learned from what is told."""
        return self.named.get("demonstration") == ""

    def pick(self, row: Row, name: str, groups: list[tuple[str, ...]]) -> str | None:
        if name in self.named:
            column = self.named[name]
            return column if column and look_up(row.value, column) is not None else None
        for group in groups:
            there = [each for each in (spelled(row.value, alias) for alias in group) if fits(name, row.value, each)]
            if len(there) > 1:
                advice = f'data.columns = {{{name} = "{there[0]}"}}'
                raise UserError(
                    f"{row.source}: the columns {' and '.join(map(repr, there))} could both be the {name}; "
                    f"say which: {advice}"
                )
            if there:
                return there[0]
        return None

    def examples(self, row: Row, taken: dict[str, str]) -> list[Example]:
        """One example, or with turns "all" one for each assistant turn, the last of the chat at the end.

        Raises UserError, with file and line, for a row that cannot be used.
        """
        for column in dict.fromkeys(taken.values()):
            check_text(look_up(row.value, column), f"{row.source}: {column}")
        chat, start = whole_chat(row, taken)
        answer = answer_of(row, taken)
        columns = {str(name): each for name, each in row.value.items() if name not in (*OWN, *RESERVED)}
        tools = to_tools(look_up(row.value, taken.get("tools")), f"{row.source}: tools", row.padded)

        def example(messages: list[Turn], turn: Turn | None, answer: str | None) -> Example:
            text = None if turn is None else text_of(turn)
            if text is not None and not text.strip():
                raise UserError(f"{row.source}: demonstration: expected text or null, found {shown(text)}")
            more = turn if turn and is_more_than_text(turn) else None
            options = choices.texts if choices else None
            return Example(messages, text, answer, row.task, columns, row.source, tools, more, options)

        last = chat.pop() if chat[-1]["role"] == "assistant" else None
        choices = choices_of(row, taken["choices"], taken.get("answer")) if "choices" in taken else None
        if choices:
            question = chat[-1]["content"]
            if choices.stand_in(question):
                found = "the question has its options in it; leave the others out"
                raise UserError(f'{row.source}: {found}: data.columns = {{choices = ""}}')
            if choices.unordered or not last:  # a demonstration may name a letter of the file
                choices = choices.shuffled(self.choice_seed, question)
            chat[-1] = {**chat[-1], "content": choices.asked(question)}
            answer = choices.letter
        if not chat or chat[-1]["role"] == "assistant":
            found = "two assistant turns at their end, one after the other" if chat else "no user turn to answer"
            raise UserError(f"{row.source}: messages have {found}")
        if last is None or self.told_nothing or not is_learned(last):
            last = None
        earlier = [
            example(chat[:index], turn, None)
            for index, turn in enumerate(chat)
            if self.turns == "all" and not self.told_nothing and index >= start and is_learned(turn)
            if any(each["role"] == "user" for each in chat[:index]) and chat[index - 1]["role"] != "assistant"
        ]
        return [*earlier, example(chat, last, answer)]


def chat_that_answers(row: dict, found: dict[str, str]) -> str | None:
    """The column of the row's chat, where that ends in an assistant turn."""
    column = found.get("messages") or found.get("prompt")
    value = unpacked(look_up(row, column))
    last = value[-1] if isinstance(value, list) and value else None
    role = (last.get("role") or last.get("from")) if isinstance(last, dict) else None
    return column if role_of(role) == "assistant" else None


def check_whole(row: Row, found: dict[str, str], without_choices: bool = False) -> None:
    """Raise UserError for a row of which the prompt would be a part only. without_choices: these are not wanted."""
    column = found.get("messages") or found["prompt"]
    told = chat_that_answers(row.value, found) or found.get("demonstration") in ("completion", "response")
    if told and isinstance(look_up(row.value, spelled(row.value, "label")), bool):
        raise UserError(
            f"{row.source}: the column 'label' says which completions are good (TRL's KTO), and all of them would be "
            'imitated: keep the good ones and drop the column, or data.columns = {demonstration = ""}'
        )
    unsaid = () if column in OWN or "messages" in found else UNSAID
    if without_choices or "choices" in found:
        unsaid = [each for each in unsaid if each not in CHOICES]
    unseen = [*UNSEEN, *(name for name in row.value if isinstance(name, str) and IMAGE.fullmatch(name.lower()))]
    for alias in (*unsaid, *unseen):
        name = spelled(row.value, alias)
        there = row.value.get(name) or (alias in CHOICES and row.value.get(name) == [])
        if there and name != column and not (column.lower() == "instruction" and alias in MORE):
            what = "text is all that is trained on" if alias in unseen else "write the whole prompt into one column"
            raise UserError(
                f"{row.source}: the column {name!r} would not be seen, the prompt is {column!r} alone; {what}, "
                f"or say that it is the prompt: data.columns = {{{'messages' if 'messages' in found else 'prompt'} = "
                f'"{column}"}}'
            )


def whole_chat(row: Row, taken: dict[str, str]) -> tuple[list[Turn], int]:
    """The chat with its demonstration at the end, and where in it the turns begin that may be learned from."""
    column = taken.get("messages") or taken["prompt"]
    value = look_up(row.value, column)
    if column.lower() == "instruction" and isinstance(value, str):
        more = (row.value.get(spelled(row.value, each)) for each in MORE)
        value = "\n".join([value, *(each for each in more if isinstance(each, str) and each.strip())])
    chat = to_chat(value, f"{row.source}: {column}", padded=row.padded)
    if "system" in taken:
        system = to_chat(look_up(row.value, taken["system"]), f"{row.source}: {taken['system']}", "system")
        if chat[0]["role"] in ("system", "developer"):
            raise UserError(
                f"{row.source}: the chat has a system turn and there is a column {taken['system']!r} too; "
                'leave that out: data.columns = {system = ""}'
            )
        chat = system + chat
    column = taken.get("demonstration")
    if column is None or column in (taken.get("messages"), taken.get("prompt")):
        return chat, 0
    value = look_up(row.value, column)
    if spelled(row.value, "generations") == column:
        value = first_right(row.value, value)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = value[0]  # OlympiadBench's solutions
    if isinstance(value, str) and not value.strip():  # an empty one is none
        return chat, 0
    if not isinstance(value, (str, list, dict)):
        raise UserError(f"{row.source}: {column}: expected text or null, found {shown(value)}")
    told = to_chat(value, f"{row.source}: {column}", "assistant", row.padded)
    if told[-1]["role"] != "assistant":
        raise UserError(f"{row.source}: {column}: expected it to end in an assistant turn, found {shown(told[-1])}")
    return chat + told, len(chat)


def answer_of(row: Row, taken: dict[str, str]) -> str | None:
    """The reference answer as text; None where there is none, or only space."""
    value = look_up(row.value, taken.get("answer"))
    if several_answers(value, taken.get("answer")):
        value = ", ".join(map(str, from_cell(value)))
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"{row.source}: {taken['answer']}: expected text or a number, found {shown(value)}")
    if value is None or value != value:  # a table's NaN
        return None
    text = str(value)
    if taken["answer"] == taken.get("demonstration"):
        text = final(value) or text
    return text if text.strip() else None


def several_answers(value: Any, column: str | None) -> bool:
    """OlympiadBench's list of answers, or a list of one; in a cell of texts alone, since [0, 1] is an interval."""
    if not column or column == "answer" or (column.lower() != "final_answer" and not isinstance(value, list)):
        return False
    if column.lower() != "final_answer" and len(value) != 1:
        return False
    found = from_cell(value)
    kinds = (str, int, float) if isinstance(value, list) else str
    return isinstance(found, list) and bool(found) and all(isinstance(each, kinds) for each in found)


def fits(name: str, row: dict, column: str | None) -> bool:
    """Whether the column can be what its name says. Our own names are taken at their word, and refused later."""
    value = look_up(row, column)
    if value is None:
        return False
    if column == "extra_info.answer":
        return worked(value)
    if column in OWN or name == "tools" or column.lower() == "completion":
        return True
    if name == "answer":
        return isinstance(value, (str, int, float)) or several_answers(value, column)
    if name == "choices":
        return are_choices(value)
    if name == "system":
        return bool(value.strip() if isinstance(value, str) else value)
    if column.lower() == "generations":
        return first_right(row, value) is not None
    if column.lower() == "target":
        return isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return isinstance(value, (str, list, dict))


def rated(row: dict) -> bool:
    """Whether the row has OpenR1's generations with a verdict on each."""
    column = spelled(row, "generations")
    return isinstance(row.get(column), list) and any(isinstance(row.get(name), list) for name in VERDICTS)


def first_right(row: dict, generations: Any) -> str | None:
    """Of several solutions the first that a verdict calls right, or the first where there is no verdict."""
    if not isinstance(generations, list):
        return None
    verdicts = [row[name] for name in VERDICTS if isinstance(row.get(name), list)]
    right = [not verdicts or any(each[at : at + 1] == [True] for each in verdicts) for at in range(len(generations))]
    texts = [text for text, good in zip(generations, right) if good and isinstance(text, str) and text.strip()]
    return texts[0] if texts else None


def worked(answer: Any) -> bool:
    """Whether an answer is a worked solution, as GSM8K's: text, the mark, and the answer behind it."""
    steps, mark, final = answer.rpartition(HASHES) if isinstance(answer, str) else ("", "", "")
    return bool(steps.strip() and mark and final.strip())


def final(solution: Any) -> str:
    """The answer that a worked solution ends in: its last line, behind ####, or its last box; "" where neither is."""
    if isinstance(solution, list) and solution:
        solution = solution[0]
    if not isinstance(solution, str):
        return ""
    tail = solution.rpartition(HASHES)[2].strip() if worked(solution) else ""
    return tail if tail and "\n" not in tail else last_box(solution) or ""


def is_learned(turn: Turn) -> bool:
    """An assistant turn, unless it has OpenAI's or axolotl's sign for one that is not to be learned from."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0 and turn.get("train") is not False


def spelled(row: dict, alias: str) -> str | None:
    """The column's name in the row, in whatever case; a dotted alias leads into a column that is a table."""
    if "." in alias or alias in row:
        return alias
    return next((each for each in row if isinstance(each, str) and each.lower() == alias), None)


def look_up(row: dict, column: str | None) -> Any:
    """The value of a column, or of `column.key` in a table; None where there is none."""
    if column is None or column in row:
        return row.get(column)
    name, _, key = column.partition(".")
    inner = row.get(name)
    return look_up(inner, key) if key and isinstance(inner, dict) else None


def check_text(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: a lone surrogate, {half!a}, is half of a character and no text") from error
