"""A chat as the tokenizer's chat template writes it, and a demonstration as what follows the prompt in that writing.

template = Template(tokenizer, "<|im_end|>", {"enable_thinking": False})
prompt = template.prompt(messages, tools, where)              # text, up to where the model starts to speak
template.continuation(prompt, messages, tools, turn, where)   # text, up to where the model's turn ends
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
REFUSALS = (TemplateError, TypeError, KeyError, ValueError, AttributeError)  # of templates that expect another chat


@dataclass(frozen=True)
class Template:
    """end: the token that ends the model's turn, as text.   args: what else the template gets, data.template_args."""

    tokenizer: "PreTrainedTokenizerBase"
    end: str
    args: dict[str, Any] = field(default_factory=dict)

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
        """The chat and the beginning of an answer; UserError where the template refuses it, or passes over a part."""
        text = self.write(messages, tools, where, add_generation_prompt=True)
        for tool in tools or ():
            if tool["function"]["name"] not in text:
                advice = 'take a model that knows tools, or leave them out: data.columns = {tools = ""}'
                raise UserError(f"{where}: tools: the chat template of the tokenizer does not show them; {advice}")
        for turn in messages:
            if not shows_calls(text, turn):
                raise UserError(f"{where}: tool_calls: the chat template of the tokenizer does not show them")
        return text

    def continuation(self, prompt: str, messages: list[Turn], tools: Tools, turn: Turn, where: str) -> str:
        """What the assistant's `turn` adds to the prompt, without the token that ends it.

        As the template writes it, where that goes on from the prompt and keeps every part; else its text as it is.
        """
        thought = THOUGHT.search(prompt)
        start = thought.start() if thought else len(prompt)
        try:
            whole = self.write([*messages, turn], tools, where)
        except UserError:  # a template may know no answer that is given
            whole = ""
        written = None
        if whole.startswith(prompt):
            written = self.before_end(whole[len(prompt) :])
        elif "tool_calls" in turn and whole.startswith(prompt[:start]):  # the call stands where the thought would
            written = self.before_end(whole[start:])
        if written is None or not shows(prompt[start:] + written, turn):
            if "tool_calls" in turn:
                found = "the chat template of the tokenizer does not show them as what follows the prompt"
                raise UserError(f"{where}: tool_calls of the demonstration: {found}")
            written = text_of(turn)
        return written if thought is None else after_thought(thought, written, where)

    def before_end(self, text: str) -> str:
        before, end, _ = text.rpartition(self.end)
        return before if end else text.rstrip()

    def write(self, messages: list[Turn], tools: Tools, where: str, **args: Any) -> str:
        """The template's text of the first form of the chat that it takes."""
        refused: BaseException | None = None
        given = {"tokenize": False, "tools": tools, **args, **self.args}
        for chat in forms(messages):
            try:
                text = self.tokenizer.apply_chat_template(chat, **given)
            except REFUSALS as error:
                refused = refused or error
                continue
            if "None" not in text or all(turn["content"] is not None for turn in chat):  # content that is null, printed
                return text
        raise UserError(f"{where}: the chat template of the tokenizer refuses it: {first_line(refused)}") from refused


def forms(messages: list[Turn]) -> Iterator[list[Turn]]:
    """A chat as it is, then with what some templates want instead: arguments as text, no null, no system turn."""
    blank = [{**turn, "content": turn["content"] or ""} for turn in messages]
    for chat in [messages] if blank == messages else [messages, blank]:
        yield chat
        if any("tool_calls" in turn for turn in chat):
            yield [as_text(turn) for turn in chat]
    system, *rest = blank
    if rest and system["role"] == "system":  # Gemma's: the user's first turn says it
        yield [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def as_text(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    functions = [(call, call["function"], call["function"]["arguments"]) for call in turn["tool_calls"]]
    texts = [arguments if isinstance(arguments, str) else json.dumps(arguments) for *_, arguments in functions]
    calls = [
        {**call, "function": {**function, "arguments": text}} for (call, function, _), text in zip(functions, texts)
    ]
    return {**turn, "tool_calls": calls}


def shows_calls(text: str, turn: Turn) -> bool:
    """Whether the names of the functions that a turn calls stand in the text, and those of their arguments."""
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    told = [name for each in functions for name in (each["name"], *as_names(each["arguments"]))]
    return all(name in text for name in told)


def as_names(arguments: Any) -> list[str]:
    return list(map(str, arguments)) if isinstance(arguments, dict) else []


def shows(text: str, turn: Turn) -> bool:
    """Whether every part of the turn stands in the text, spaces apart."""
    parts = [turn["content"], *(turn.get(key) for key in THOUGHTS)]
    text_alone = squeezed(text)
    return all(squeezed(part) in text_alone for part in parts if isinstance(part, str)) and shows_calls(text, turn)


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
