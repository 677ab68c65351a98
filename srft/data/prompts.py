"""Examples become token ids: the tokenizer's chat template where it has one, plain text where not.

prompter = build_prompter(tokenizer, config.data)
prompter.encode_prompt(example)            # ids up to where the model starts to speak
prompter.encode_demonstration(example)     # ids of the demonstration as the model would have said it, end included
prompter.problem(example)                  # both
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srft.config import DataConfig
from srft.data.examples import Example
from srft.data.tasks import SYSTEM_PROMPT
from srft.errors import UserError

try:
    from jinja2 import TemplateError  # what transformers renders chat templates with
except ImportError:

    class TemplateError(Exception):
        """Without jinja2 no template is rendered."""


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "a0z"  # no template changes it and no tokenizer merges it with a special token


@dataclass(frozen=True)
class Problem:
    """An example as token ids. demonstration: None where it has none, or where none is learned from."""

    example: Example
    prompt: list[int]
    demonstration: list[int] | None


@dataclass(frozen=True)
class Prompter:
    """tokenizer; the system prompt or None; the most tokens a prompt may have; the id that ends the model's turn."""

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None
    max_prompt_tokens: int
    end_id: int

    def encode_prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt; raises UserError when it is longer than data.max_prompt_tokens."""
        where = example.source or example.task
        try:
            ids = self.template(example.messages) if self.tokenizer.chat_template else self.plain(example.messages)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template of the tokenizer refuses it: {error}") from error
        if len(ids) > self.max_prompt_tokens:
            found = f"the prompt has {len(ids)} tokens, data.max_prompt_tokens is {self.max_prompt_tokens}"
            raise UserError(f"{where}: {found}; raise it or shorten {shorten(example)!r}")
        return ids

    def encode_demonstration(self, example: Example) -> list[int]:
        """Token ids of the demonstration and of the end of the turn; the demonstration must not be None."""
        # Encoded by itself, as a rollout is: its first token follows the prompt's last one unmerged.
        return [*self.tokenizer.encode(example.demonstration, add_special_tokens=False), self.end_id]

    def problem(self, example: Example, with_demonstration: bool = True) -> Problem:
        """Raises UserError for a prompt that is too long, or empty."""
        prompt = self.encode_prompt(example)
        if not prompt:
            raise UserError(f"{example.source or example.task}: the prompt is empty; there is nothing to continue")
        shown = with_demonstration and example.demonstration is not None
        return Problem(example, prompt, self.encode_demonstration(example) if shown else None)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if not self.system_prompt or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def template(self, messages: list[dict[str, str]]) -> list[int]:
        chat = self.with_system(messages)
        try:
            return apply(self.tokenizer, chat)
        except TemplateError:
            if chat[0]["role"] != "system" or len(chat) == 1:
                raise
        # Some templates (Gemma's) know no system turn: the user's first turn says it.
        system, first, *rest = chat
        return apply(self.tokenizer, [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest])

    def plain(self, messages: list[dict[str, str]]) -> list[int]:
        text = "\n\n".join(turn["content"] for turn in self.with_system(messages)) + "\n"
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return ids[:-1] if ids[-1] == self.end_id else ids  # a tokenizer that closes its input would end the text


def build_prompter(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> Prompter:
    """A Prompter; with data.system_prompt unset, generated tasks ask for the answer after "####", files for nothing."""
    system_prompt = config.system_prompt
    if system_prompt is None and not config.train_file:
        system_prompt = SYSTEM_PROMPT
    return Prompter(tokenizer, system_prompt, config.max_prompt_tokens, end_of_turn(tokenizer))


def apply(tokenizer: "PreTrainedTokenizerBase", chat: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends an assistant's turn in the chat template, else the tokenizer's end of sequence."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
        tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(SENTINEL)[2]
        for token in tokenizer.encode(tail, add_special_tokens=False):
            if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def shorten(example: Example, length: int = 60) -> str:
    text = example.messages[-1]["content"]
    return text if len(text) <= length else text[:length] + "…"
