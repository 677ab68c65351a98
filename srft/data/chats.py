"""Chats as chat templates take them: {"role": …, "content": …, "tool_calls": …}, from the forms that people have.

OpenAI's and ShareGPT's turns, content as text parts, tool calls with arguments as text or as a table.
"""

import ast
import contextlib
import json
import re
from typing import Any

from srft.data.examples import Turn
from srft.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"ai": "assistant", "bing": "assistant", "bard": "assistant", "prompter": "user"}
ROLES |= {"observation": "tool", "tool_response": "tool", "function": "tool", "function_call": "assistant"}
KNOWN = ("system", "developer", "user", "assistant", "tool", "ipython")  # the last is Llama's for what a tool says
# A text that is meant to be a chat: a list of turns, or one, with a role and something said.
CHAT = re.compile(
    r"""\s*(\[\s*)?\{(?=[^{}]*['"](role|from)['"]\s*:)(?=.*['"](content|value|tool_calls)['"]\s*:)""", re.DOTALL
)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # under which templates look for a turn's reasoning


def to_chat(value: Any, where: str, role: str = "user", padded: bool = False) -> list[Turn]:
    """A chat is checked, and each turn brought into the common form; a text becomes one turn of `role`.

    where: "file:line: column", with which messages start.   padded: nulls inside of turns stand for what is not there.
    """
    value = unpacked(value)
    if isinstance(value, str) and value.lstrip().startswith(("[{", "[\n", "[ ")) and CHAT.match(value):
        raise UserError(f"{where}: expected a chat as JSON, found {shown(value)}, which cannot be read")
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected text or a list of turns, found {shown(value)}")
    return [to_turn(each, where, padded) for each in value]


def unpacked(value: Any) -> Any:
    """A chat that is JSON, or Python's way of writing it, in a cell of a table; anything else as it is."""
    if not isinstance(value, str) or not CHAT.match(value):
        return value
    chat = parsed(value)
    if chat is None:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            chat = ast.literal_eval(value.strip())  # what pandas writes into a CSV
    turns = chat if isinstance(chat, list) else [chat]
    return turns if all(map(is_turn, turns)) else value


def is_turn(value: Any) -> bool:
    """Whether a table is a turn, and not other data that has a role, or is from somewhere."""
    if not isinstance(value, dict) or not {"content", "value", "tool_calls"} & value.keys():
        return False
    return role_of(value.get("role", value.get("from"))) in KNOWN


def to_turn(value: Any, where: str, padded: bool = False) -> Turn:
    if not isinstance(value, dict):
        raise UserError(f'{where}: a turn is {{"role": text, "content": text}}, found {shown(value)}')
    given = {key: each for key, each in value.items() if each is not None}
    said = given.pop("from", None), given.pop("value", None)  # ShareGPT's names of role and content
    named, content = given.pop("role", said[0]), given.pop("content", said[1])
    role = role_of(named)
    if named == "function_call":
        given["tool_calls"], content = content, None
    if "function_call" in given:  # before tool_calls, OpenAI's turns had this one
        given["tool_calls"] = [given.pop("function_call")]
    if given.get("tool_calls"):
        given["tool_calls"] = to_calls(given["tool_calls"], where, padded)
    else:
        given.pop("tool_calls", None)
    if isinstance(content, list):
        content = joined(content, where)
    if content is None and (role == "tool" or "tool_calls" in value) and "tool_calls" not in given:
        content = ""  # a tool that says nothing, or a turn with an empty list of calls
    more = role == "assistant" and ("tool_calls" in given or any(key in given for key in THOUGHTS))
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and more)):
        raise UserError(f'{where}: a turn is {{"role": text, "content": text}}, found {shown(value)}')
    if role not in KNOWN:
        raise UserError(f"{where}: expected a turn of {', '.join((*KNOWN, *ROLES))}, found the role {named!r}")
    return {"role": role, "content": content, **given}


def role_of(name: Any) -> str | None:
    """The role by the name that chat templates have for it."""
    return ROLES.get(name.lower(), name.lower()) if isinstance(name, str) else None


def joined(parts: list[Any], where: str) -> str:
    """Text parts as one text, which every template can show."""
    for part in parts:
        if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            found = part.get("type", part) if isinstance(part, dict) else part
            raise UserError(f"{where}: a part of the content is of type {found!r}; srft trains on text alone")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def to_calls(value: Any, where: str, padded: bool) -> list[dict[str, Any]]:
    calls = parsed(value) or value if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = without_nulls(call) if padded else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f'{where}: a tool call is {{"function": {{"name": text, "arguments": table}}}}, found {shown(call)}'
            )
        arguments = function.get("arguments", {})
        table = parsed(arguments) if isinstance(arguments, str) else arguments  # transformers' templates take a table
        function = {**function, "arguments": arguments if table is None else table}
        own = {key: each for key, each in call.items() if key not in ("name", "arguments")}
        made.append({**({} if "type" in own else {"type": "function"}), **own, "function": function})  # in its order
    return made


def to_tools(value: Any, where: str, padded: bool = False) -> list[dict[str, Any]] | None:
    """The functions that a model may call, each {"type": "function", "function": {"name": …, …}}; None for none."""
    tools = parsed(value) if isinstance(value, str) and value.strip() else value
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    made = []
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = without_nulls(tool) if padded else tool
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise UserError(f'{where}: a tool is {{"function": {{"name": text, …}}}}, found {shown(tool)}')
        made.append(tool)
    return made


def text_of(turn: Turn) -> str:
    """An assistant turn as text: its reasoning, what it says, and its calls as JSON."""
    thought = next((turn[key] for key in THOUGHTS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    parts = [f"<think>\n{thought.strip()}\n</think>\n\n" if thought else "", turn["content"] or ""]
    calls = "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ()))
    return "".join(parts) + ("\n" if parts[1] and calls else "") + calls


def is_more_than_text(turn: Turn) -> bool:
    return "tool_calls" in turn or any(key in turn for key in THOUGHTS)


def shown(value: Any, length: int = 200) -> str:
    """A value in a message to the user: rows may be long."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


def parsed(text: Any) -> Any:
    """The JSON that a text is, or None."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
