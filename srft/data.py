"""Examples to learn from and to be measured on, from files or from generated tasks.

    train = load_examples(config.data, "train", config.data.size)
    held_out = load_examples(config.data, "eval", config.eval.prompts)

A row of a `.jsonl` or `.parquet` file has `prompt` (text) or `messages` (a chat), and usually `demonstration` (a worked
solution) and `answer` (what a verifier compares with); a chat that ends in an assistant turn carries its demonstration
there. Other columns go to the reward function. A hash of the prompt decides which side it is on, so train and eval
never share one, whatever the seeds and sizes, and evaluating an old checkpoint never meets its training prompts.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from srft.config import DataConfig
from srft.errors import UserError, missing

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


def load_examples(config: DataConfig, split: Split, count: int = 0) -> list[Example]:
    """At most `count` examples of one side, every prompt once, in an order fixed by the seed; 0: as many as there are.

    Fewer come back where a file or a small task has no more distinct prompts. Raises UserError for a file that cannot
    be read, a broken line, a missing column, an unknown task, and a side without any example.
    """
    if config.train_file or config.eval_file:
        return from_files(config, split, count)
    from srft.tasks import generate

    return generate(config, split, count)


def from_files(config: DataConfig, split: Split, count: int) -> list[Example]:
    if not config.train_file:
        raise UserError("data.train_file: data.eval_file alone was given; name a file to train on too")
    rows = list(read_rows(config.train_file))
    if config.eval_file:
        held_out = list(read_rows(config.eval_file))
        kept_apart = {prompt_hash(each) for each in held_out}
    else:
        hashes = sorted({prompt_hash(each) for each in rows})
        kept_apart = set(hashes[: max(1, len(hashes) // HELD_OUT)])
        held_out = [each for each in rows if prompt_hash(each) in kept_apart]
    train = [each for each in rows if prompt_hash(each) not in kept_apart]
    if not train:
        found = (
            "every prompt of it is also in data.eval_file" if config.eval_file else "it has one prompt, two are needed"
        )
        raise UserError(f"{config.train_file}: nothing is left to train on: {found} (one in {HELD_OUT} is held out)")
    # A prompt is measured once, but may be trained on with several demonstrations.
    examples = train if split == "train" else list({prompt_hash(each): each for each in held_out}.values())
    # Evaluation keeps a seed of its own: what is measured stays the same when the training seed changes.
    random.Random(config.seed if split == "train" else config.eval_seed).shuffle(examples)
    return examples[: count or None]


def prompt_hash(example: Example) -> int:
    text = json.dumps(example.messages, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_rows(path: str) -> Iterator[Example]:
    """The examples of a `.jsonl` or `.parquet` file; errors name file and line (rows of parquet count from 1)."""
    file = Path(path).expanduser()
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    if file.suffix not in readers:
        raise UserError(f"{path}: expected a file that ends in .jsonl or .parquet")
    if not file.is_file():
        raise UserError(f"{path}: there is no such file")
    empty = True
    for number, row in readers[file.suffix](file):
        empty = False
        yield to_example(row, f"{path}:{number}", file.stem)
    if empty:
        raise UserError(f"{path}: the file has no rows; each one needs a prompt or messages")


def read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8 text: {error.reason} at byte {error.start}") from error
            except json.JSONDecodeError as error:
                found = f"{error.msg} at column {error.colno}"
                raise UserError(f"{file}:{number}: not valid JSON ({found}); each line is one object") from error


def read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing("pyarrow", "reading parquet files") from error
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet: {error}") from error


def to_example(row: Any, source: str, task: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected an object with named columns, found {type(row).__name__}")
    columns = dict(row)
    chat, text = columns.pop("messages", None), columns.pop("prompt", None)
    demonstration, answer = columns.pop("demonstration", None), columns.pop("answer", None)
    if chat is None and text is None:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"{source}: the column 'prompt' or 'messages' is missing; found columns: {found}")
    messages = to_messages(text if chat is None else chat, source, "prompt" if chat is None else "messages")
    if messages[-1]["role"] == "assistant":
        if demonstration is not None:
            raise UserError(
                f"{source}: messages end in an assistant turn and there is a demonstration too; keep one of them"
            )
        demonstration = messages.pop()["content"]
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{source}: messages have no user turn to answer")
    if demonstration is not None and (not isinstance(demonstration, str) or not demonstration.strip()):
        raise UserError(f"{source}: demonstration: expected text or null, found {demonstration!r}")
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise UserError(f"{source}: answer: expected text or a number, found {answer!r}")
    return Example(messages, demonstration, None if answer is None else str(answer), task, columns, source)


def to_messages(value: Any, source: str, column: str) -> list[dict[str, str]]:
    """A text becomes one user turn; a chat is checked."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{source}: {column}: expected text or a list of turns, found {value!r}")
    for turn in value:
        if not (isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))):
            raise UserError(f'{source}: {column}: a turn is {{"role": text, "content": text}}, found {turn!r}')
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
