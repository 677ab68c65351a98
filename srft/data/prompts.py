"""Examples become token ids: the tokenizer's chat template where it has one, plain text where not.

prompter = build_prompter(tokenizer, config.data)
prompter.encode_prompt(example)            # ids up to where the model starts to speak
prompter.encode_demonstration(example)     # ids of the demonstration as the model would have said it, end included
prompter.problem(example)                  # both, however long: overlong.py says what becomes of them
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from srft.config import DataConfig
from srft.data.examples import Example, Turn
from srft.data.tasks import SYSTEM_PROMPT
from srft.data.templates import OTHER, REFUSALS, Template, forms
from srft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """An example as token ids. demonstration: None where it has none, or where none is learned from."""

    example: Example
    prompt: list[int]
    demonstration: list[int] | None


@dataclass(frozen=True)
class Prompter:
    """tokenizer; the system prompt or None; the id that ends the model's turn.

    template: None where a chat is written as plain text.
    """

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None
    end_id: int
    template: Template | None = None

    def encode_prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt."""
        return self.prompt_ids(self.prompt_text(example))

    def prompt_ids(self, text: str) -> list[int]:
        if self.template:
            return self.ids(text)
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return ids[:-1] if ids[-1:] == [self.end_id] else ids  # a tokenizer that closes its input would end the text

    def prompt_text(self, example: Example) -> str:
        if self.template:
            return self.template.prompt(self.chat(example), example.tools, example.where)
        self.check_plain(example)
        text = "\n\n".join(turn["content"] or "" for turn in self.chat(example))
        return text if not text or text[-1].isspace() else text + "\n"

    def encode_demonstration(self, example: Example) -> list[int]:
        """Token ids of the demonstration and of the end of the turn; the demonstration must not be None."""
        return self.demonstration_ids(example, self.prompt_text(example))

    def demonstration_ids(self, example: Example, prompt: str) -> list[int]:
        text, ended = example.demonstration, True
        if self.template:
            turn = example.turn or {"role": "assistant", "content": text}
            text, ended = self.template.continuation(prompt, self.chat(example), example.tools, turn, example.where)
        ids = self.ids_behind(prompt, text)
        # A turn that the template ends by a token of its own, as some do after a call, has its end.
        own = not ended and is_special(self.tokenizer, ids[-1])
        own &= not self.tokenizer.decode(ids[-1:]).startswith("</")  # that closes the call
        return ids if own else [*ids, self.end_id]

    def problem(self, example: Example, with_demonstration: bool = True) -> Problem:
        """Raises UserError for a prompt that is empty, and for what the chat template does not take."""
        text = self.prompt_text(example)
        prompt = self.prompt_ids(text)
        if not prompt:
            raise UserError(f"{example.where}: the prompt is empty; there is nothing to continue")
        if not with_demonstration or example.demonstration is None:
            return Problem(example, prompt, None)
        demonstration = self.demonstration_ids(example, text)
        if example.turn:  # what is scored is what a rollout would have been
            example = dataclasses.replace(example, demonstration=self.decode(demonstration))
        return Problem(example, prompt, demonstration)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ids_behind(self, prompt: str, text: str) -> list[int]:
        """Token ids of a text as a rollout has them, whose first token follows the prompt's last one unmerged."""
        if self.marks_beginnings:
            for before in (prompt, "\n"):
                start, whole = self.ids(before), self.ids(before + text)
                if whole[: len(start)] == start:
                    return whole[len(start) :]
        return self.ids(text)

    @cached_property
    def marks_beginnings(self) -> bool:
        """Whether the tokenizer takes the beginning of a text for that of a word, as SentencePiece does."""
        return self.ids("\na") != self.ids("\n") + self.ids("a")

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, example: Example) -> list[Turn]:
        """The example's messages, after the system prompt where they have none of their own."""
        if not self.system_prompt or example.messages[0]["role"] in ("system", "developer"):
            return example.messages
        return [{"role": "system", "content": self.system_prompt}, *example.messages]

    def check_plain(self, example: Example) -> None:
        calls = any("tool_calls" in turn for turn in [*example.messages, example.turn or {}])
        if example.tools or calls:
            what = "tool_calls" if calls else "tools"
            raise UserError(f"{example.where}: {what}: plain text has no form for them; a chat template is needed")


def build_prompter(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> Prompter:
    """A Prompter; with data.system_prompt unset, generated tasks ask for the answer after "####", files for nothing."""
    system_prompt = config.system_prompt
    if system_prompt is None and not config.train_file:
        system_prompt = SYSTEM_PROMPT
    templated = bool(tokenizer.chat_template) and config.template == "auto"
    end_id = end_of_turn(tokenizer, templated)
    template = Template(tokenizer, tokenizer.convert_ids_to_tokens(end_id), config.template_args) if templated else None
    if config.template_args and not templated:
        why = "data.template is none" if tokenizer.chat_template else "the tokenizer has no chat template"
        raise UserError(f"data.template_args: {', '.join(config.template_args)} cannot be used: {why}")
    return Prompter(tokenizer, system_prompt, end_id, template)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", templated: bool = True) -> int:
    """The id that ends an assistant's turn in the chat template, else the tokenizer's end of sequence."""
    if tokenizer.chat_template and templated:
        for chat in forms([{"role": "user", "content": "?"}, {"role": "assistant", "content": OTHER}]):
            with contextlib.suppress(*REFUSALS):
                _, said, tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(OTHER)
                if said:
                    for token in tokenizer.encode(tail, add_special_tokens=False):
                        if is_special(tokenizer, token):
                            return token
                    break
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def is_special(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
