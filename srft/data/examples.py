"""An example: a prompt with what is known of its solution. A hash of the prompt says on which side it is."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "eval"]
HELD_OUT = 8  # one prompt in so many is for evaluation


@dataclass(frozen=True)
class Example:
    """One prompt with what is known of its solution.

    messages: the chat up to and including the user's turn, each {"role": …, "content": …}.
    demonstration: a worked solution to imitate, or None.   answer: what a verifier compares with, or None.
    task: name of the generator or of the file.   columns: everything else, for reward functions.
    source: where it comes from ("train.jsonl:12"), for messages to the user.
    """

    messages: list[dict[str, str]]
    demonstration: str | None
    answer: str | None
    task: str
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The text of a single user turn, else the whole chat."""
        alone = len(self.messages) == 1 and self.messages[0]["role"] == "user"
        return self.messages[0]["content"] if alone else self.messages


def prompt_hash(example: Example) -> int:
    text = json.dumps(example.messages, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
