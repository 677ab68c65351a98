"""An example: a prompt with what is known of its solution. A hash of the prompt says on which side it is."""

import hashlib
import json
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "eval"]
Turn = dict[str, Any]
HELD_OUT = 8  # one prompt in so many is for evaluation
# What chat templates see of a turn.
SEEN = ("role", "content", "tool_calls", "name", "reasoning_content", "reasoning", "thinking")
LETTERS = string.ascii_uppercase  # of the options of a multiple-choice question
RESERVED = ("prompts", "completions", "task")  # what a reward function gets by these names is not a column


@dataclass(frozen=True)
class Example:
    """One prompt with what is known of its solution.

    messages: the chat up to where the assistant speaks, each {"role": …, "content": …} and what else the turn has.
    demonstration: a worked solution to imitate, or None.   answer: what a verifier compares with, or None.
    task: name of the generator or of the file.   columns: everything else, for reward functions.
    source: where it comes from ("train.jsonl:12"), for messages to the user.
    tools: functions that the chat template shows, or None.
    turn: the demonstration as an assistant turn, where it is more than a text: tool_calls, reasoning_content.
    choices: the options of a multiple-choice question in the order of its letters, of which the answer is one, or None.
    """

    messages: list[Turn]
    demonstration: str | None
    answer: str | None
    task: str
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    tools: list[dict[str, Any]] | None = None
    turn: Turn | None = None
    choices: list[str] | None = None

    @property
    def prompt(self) -> str | list[Turn]:
        """The text of a single user turn, else the whole chat."""
        alone = len(self.messages) == 1 and self.messages[0]["role"] == "user"
        return self.messages[0]["content"] if alone else self.messages

    @property
    def where(self) -> str:
        """What messages to the user call it."""
        return self.source or self.task


def digest(parts: Iterable[Any]) -> str:
    """A text that is the same for the same parts: what JSON can say of them."""
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part, default=str, sort_keys=True).encode("utf-8", "replace"))
    return found.hexdigest()


def listed(choices: list[str]) -> str:
    """The options of a question as its prompt has them."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))


def prompt_hash(example: Example) -> int:
    """The same for prompts that a chat template writes alike, and for a question in whatever order its options are.

    What else a turn has, an id or a date, does not count.
    """
    told: list[Any] = [{key: turn[key] for key in SEEN if key in turn} for turn in example.messages]
    if example.choices:
        alike = listed(example.choices), listed(sorted(example.choices))
        told[-1]["content"] = told[-1]["content"].replace(*alike)
    for turn in told:
        if turn["content"] is None:
            turn["content"] = ""
        if "tool_calls" in turn:  # without their ids, which are drawn by lot
            turn["tool_calls"] = [call["function"] for call in turn["tool_calls"]]
    told += [example.tools] if example.tools else []
    text = json.dumps(told, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
