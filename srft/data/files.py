"""Examples from files: one row of a `.jsonl` or `.parquet` file is one example.

A row has `prompt` (text) or `messages` (a chat), and usually `demonstration` (a worked solution) and `answer` (what a
verifier compares with); a chat that ends in an assistant turn carries its demonstration there. Other columns go to the
reward function.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srft.data.examples import Example
from srft.errors import UserError, missing


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
