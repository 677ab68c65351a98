"""A chat as the tokenizer's chat template writes it, and a demonstration as what follows the prompt in that writing.

template = Template(tokenizer, "<|im_end|>", {"enable_thinking": False})
prompt = template.prompt(messages, tools, where)              # text, up to where the model starts to speak
template.continuation(prompt, messages, tools, turn, where)   # text, up to where the model's turn ends, and if by `end`
"""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from srft.data.chats import THOUGHTS, text_of
from srft.data.examples import Turn
from srft.errors import UserError, first_line, nearest

try:
    from jinja2 import TemplateError  # what transformers renders chat templates with
except ImportError:

    class TemplateError(Exception):
        """Without jinja2 no template is rendered."""


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]] | None
# How the prompt of a reasoning model ends: in an open thought, or, where it is not to think, in a closed one.
THOUGHT = re.compile(
    r"(?P<opening><(?P<name>(?:\w+:)?(?:think|thinking|thought|reasoning))>|\[THINK\])(?P<space>\s*)"
    r"(?P<closed>(?:</(?P=name)>|\[/THINK\])\s*)?\Z"
)
OTHER = "a0z7q"  # what no chat says, no template changes and no tokenizer merges with a special token
PLAIN = 32  # so many characters are not in a text by chance
REFUSALS = (TemplateError, TypeError, KeyError, ValueError, AttributeError)  # of templates that expect another chat


@dataclass(frozen=True)
class Template:
    """end: the token that ends the model's turn, as text.   args: what else the template gets, data.template_args."""

    tokenizer: "PreTrainedTokenizerBase"
    end: str
    args: dict[str, Any] = field(default_factory=dict)
    shown: set[Any] = field(default_factory=set, compare=False)  # kinds of turns that the template was seen to write

    def __post_init__(self) -> None:
        """Raises UserError for an argument that the template does not know: it would pass over it in silence."""
        known = set(re.findall(r"[^\W\d]\w*", str(self.tokenizer.chat_template)))
        ours = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
        for name in self.args:
            if name in ours:
                raise UserError(f"data.template_args.{name}: srft gives the chat template this argument itself")
            if name not in known:
                found = f"the tokenizer's chat template has no argument {name!r}{nearest(name, known)}"
                raise UserError(f"data.template_args.{name}: {found}")

    def prompt(self, messages: list[Turn], tools: Tools, where: str) -> str:
        """The chat and the beginning of an answer, in the first form of the chat that the template shows whole.

        Raises UserError where it takes none, or passes over a turn, a call or a tool in each.
        """
        refused: BaseException | None = None
        missed = ""
        for chat in forms(messages):
            try:
                text = self.write(chat, tools, add_generation_prompt=True)
            except REFUSALS as error:
                refused = refused or error
                continue
            unseen = self.passed_over(text, chat, tools, add_generation_prompt=True)
            if not unseen:
                return text
            missed = missed or unseen
        if missed:
            raise UserError(f"{where}: {missed}")
        raise UserError(f"{where}: the chat template of the tokenizer refuses it: {first_line(refused)}") from refused

    def continuation(self, prompt: str, messages: list[Turn], tools: Tools, turn: Turn, where: str) -> tuple[str, bool]:
        """What the assistant's `turn` adds to the prompt, without the token that ends it, and whether that is `end`.

        As the template writes it, where that goes on from the prompt and keeps every part; else its text as it is.
        """
        thought = THOUGHT.search(prompt)
        start = thought.start() if thought else len(prompt)
        calls = "tool_calls" in turn
        for chat in forms([*messages, turn]):
            try:
                whole = self.write(chat, tools)
            except REFUSALS:  # it may know no answer that is given
                continue
            if whole.startswith(prompt):
                written = whole[len(prompt) :]
            elif calls and whole.startswith(prompt[:start]):  # the call stands where the thought would
                written = whole[start:]
            else:
                continue
            before, end, _ = written.rpartition(self.end)
            written = before if end else written.rstrip()
            if shows(prompt[start:] + written, turn) and not (calls and self.unseen(whole, chat, len(chat) - 1, tools)):
                break
        else:
            if calls:
                found = "the chat template of the tokenizer does not show them, and what is said beside them, there"
                raise UserError(f"{where}: tool_calls of the demonstration: {found}")
            written, end = text_of(turn), self.end
        return written if thought is None else after_thought(thought, written, where), bool(end)

    def write(self, chat: list[Turn], tools: Tools, **args: Any) -> str:
        """The template's text; raises what it raises, one of REFUSALS."""
        text = self.tokenizer.apply_chat_template(chat, **{"tokenize": False, "tools": tools, **args, **self.args})
        if "None" in text and any(turn["content"] is None for turn in chat):
            raise ValueError("content that is null is printed")
        parts = [part["text"] for turn in chat if isinstance(turn["content"], list) for part in turn["content"]]
        printed = any(parts) and not any("'type'" in part or '"type"' in part for part in parts)
        if printed and re.search(r"""['"]type['"]: ['"]text['"]""", text):
            raise ValueError("content that is in parts is printed as a list")
        return text

    def passed_over(self, text: str, chat: list[Turn], tools: Tools, **args: Any) -> str:
        """What the template does not show of a chat that it wrote as `text`, or ""."""
        if tools:
            others = [{**tool, "function": {**tool["function"], "name": OTHER}} for tool in tools]
            told = all(tool["function"]["name"] in text for tool in tools)
            if not told or (len(tools) not in self.shown and self.same(text, chat, others, **args)):
                advice = 'take a model that knows tools, or leave them out: data.columns = {tools = ""}'
                return f"tools: the chat template of the tokenizer does not show them; {advice}"
            self.shown.add(len(tools))
        for index in range(len(chat)):
            if (kind := kind_of(chat, index)) in self.shown:
                continue
            if unseen := self.unseen(text, chat, index, tools, **args):
                return unseen
            self.shown.add(kind)
        return ""

    def unseen(self, text: str, chat: list[Turn], index: int, tools: Tools, **args: Any) -> str:
        """The same of one turn: what might be another, and the text the same."""
        alone = squeezed(text)
        for what, other in variants(chat[index], alone):
            if self.same(text, [*chat[:index], other, *chat[index + 1 :]], tools, **args):
                if what == "tool_calls":
                    return "tool_calls: the chat template of the tokenizer does not show them"
                named = f"turn {index + 1}, of the role {chat[index]['role']!r}"
                return f"{named}: the chat template of the tokenizer does not show it"
        return ""

    def same(self, text: str, chat: list[Turn], tools: Tools, **args: Any) -> bool:
        try:
            return self.write(chat, tools, **args) == text
        except REFUSALS:  # so it looked
            return False


def kind_of(chat: list[Turn], index: int) -> tuple:
    """What turns have in common of which a template writes the same parts: who speaks, after whom, before whom, and
    how. A long chat, and a file of many, is not looked at turn by turn."""
    turn, roles = chat[index], [None, *(turn["role"] for turn in chat), None]
    content = turn["content"]
    return (*roles[index : index + 3], type(content).__name__, bool(content), len(turn.get("tool_calls", ())))


def forms(messages: list[Turn]) -> Iterator[list[Turn]]:
    """A chat as it is, then with what some templates want instead: no null, arguments as text, other roles, parts."""
    made: list[list[Turn]] = []
    for change in (as_it_is, developer_as_system, system_in_user, in_parts):
        changed = change(messages)
        blank = [{**turn, "content": "" if turn["content"] is None else turn["content"]} for turn in changed]
        for chat in (changed, [as_text(turn) for turn in changed], blank, [as_text(turn) for turn in blank]):
            if chat not in made:
                made.append(chat)
                yield chat


def as_it_is(chat: list[Turn]) -> list[Turn]:
    return chat


def developer_as_system(chat: list[Turn]) -> list[Turn]:
    return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in chat]


def system_in_user(chat: list[Turn]) -> list[Turn]:
    """Gemma's: the user's first turn says it."""
    system, *rest = developer_as_system(chat)
    if not rest or system["role"] != "system":
        return chat
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def in_parts(chat: list[Turn]) -> list[Turn]:
    """As templates of models that see images want text."""
    return [
        turn if turn["content"] is None else {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        for turn in chat
    ]


def as_text(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    functions = [(call, call["function"], call["function"]["arguments"]) for call in turn["tool_calls"]]
    texts = [arguments if isinstance(arguments, str) else json.dumps(arguments) for *_, arguments in functions]
    calls = [
        {**call, "function": {**function, "arguments": text}} for (call, function, _), text in zip(functions, texts)
    ]
    return {**turn, "tool_calls": calls}


def variants(turn: Turn, text: str) -> Iterator[tuple[str, Turn]]:
    """The turn with something else in place of each part that `text`, without spaces, does not plainly hold.

    Thoughts of earlier turns, and what is said beside a call, are for the template to leave out.
    """
    content = turn["content"]
    said = content[0]["text"] if isinstance(content, list) else content
    plain = said and len(squeezed(said)) >= PLAIN and squeezed(said) in text
    if said and said.strip() and not plain and "tool_calls" not in turn:
        yield "content", {**turn, "content": OTHER if content is said else [{"type": "text", "text": OTHER}]}
    calls = turn.get("tool_calls", [])
    for at, call in enumerate(calls):
        function, given = call["function"], call["function"]["arguments"]
        changed = [{**function, "name": OTHER}]
        if given:
            changed.append({**function, "arguments": {OTHER: OTHER} if isinstance(given, dict) else OTHER})
        for each in changed:
            yield "tool_calls", {**turn, "tool_calls": [*calls[:at], {**call, "function": each}, *calls[at + 1 :]]}


def shows(text: str, turn: Turn) -> bool:
    """Whether all that the turn says and thinks stands in the text, spaces apart."""
    alone = squeezed(text)
    parts = [turn["content"], *(turn.get(key) for key in THOUGHTS)]
    return all(squeezed(part) in alone for part in parts if isinstance(part, str))


def squeezed(text: str) -> str:
    return "".join(text.split())


def after_thought(thought: re.Match[str], text: str, where: str) -> str:
    """An answer after a prompt that ends in a thought: a thought of its own goes on in it, without one it is closed."""
    opening = thought["opening"]
    closing = f"</{thought['name']}>" if thought["name"] else "[/THINK]"
    thinks = text.lstrip().startswith(opening)
    own = text.lstrip().removeprefix(opening) if thinks else text
    if not thought["closed"]:
        if thinks:
            return own.removeprefix(thought["space"])
        return text if closing in text else f"\n{closing}\n\n{text}"
    if thinks and own.lstrip().startswith(closing):  # it says once more that nothing is thought
        return own.lstrip().removeprefix(closing).lstrip()
    if thinks:
        raise UserError(
            f"{where}: the demonstration begins with {opening}, but the chat template has closed the thought before it "
            "(data.template_args); let the model think, or take the thoughts out of the demonstrations"
        )
    return text
