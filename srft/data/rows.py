"""Rows of files: what a path means, and a reader for each format.

    for row in read_rows("train.jsonl"):      # or a directory of shards, a glob, a dataset that was saved, a hub's name
        row.source, row.value                 # "train.jsonl:12", {"prompt": …}; value is a UserError for a broken row

Formats: .jsonl, .json (a list, or an object that holds one), .csv, .tsv, .parquet, .arrow, each also with .gz.
"""

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from srft.errors import UserError, first_line, missing

TRAINED = ("train", "training", "trainset")  # splits, as datasets name them
HELD_OUT = ("test", "testing", "testset", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout")
CARDS = ("dataset_info.json", "dataset_infos.json")  # tell about a dataset and hold no rows

Numbered = Iterator[tuple[int, Any]]  # of a line, or of a row counted from 1; and its value, or a UserError


@dataclass(frozen=True)
class Row:
    """source: "file:number".   task: name of the file or directory.   value: the row, or a UserError for a broken one.

    padded: it comes from a table, where a nested object has a null for each key that another row has.
    """

    source: str
    task: str
    value: Any
    padded: bool = False


def read_rows(path: str, option: str = "data.train_file") -> Iterator[Row]:
    """The rows of what `path` names, files in the order of their names; raises UserError for what cannot be read."""
    empty = True
    for row in rows_of_hub(path, option) if is_hub_name(path) else rows_of_files(path, option):
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: the file has no rows; each one needs a prompt or messages")


def files_of(path: str, option: str = "data.train_file") -> tuple[list[str], str]:
    """The files that `path` names, in the order of their names, and what their rows are called; none of a hub."""
    file = Path(path).expanduser()
    if is_hub_name(path):
        return [], path
    if file.is_dir():
        return shards(path, file, option), file.resolve().name
    if not file.is_file() and glob.has_magic(path):
        found = sorted(each for each in glob.glob(str(file), recursive=True) if known(each))
        if not found:
            raise UserError(f"{path}: no file of a known format has such a name ({', '.join(READERS)})")
        check_splits(path, found, option)
        return found, stem(file).split("*")[0].strip("-_.") or file.parent.name
    if not known(path):
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}, each also with .gz")
    if not file.is_file():
        raise UserError(f"{path}: there is no such file")
    return [str(file)], stem(file)


def rows_of_files(path: str, option: str) -> Iterator[Row]:
    named, task = files_of(path, option)
    for each in named:
        shown = path if each == str(Path(path).expanduser()) else each
        suffix = kind(each)
        try:
            with (gzip.open if each.endswith(".gz") else open)(each, "rb") as stream:
                for number, value in READERS[suffix](stream, shown):
                    yield Row(f"{shown}:{number}", task, value, suffix in TABLES)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise UserError(f"{shown}: cannot be read: {reason}") from error


def shards(path: str, directory: Path, option: str) -> list[str]:
    """The files of a directory: those that a saved dataset lists, else all of a known format, by their names."""
    if (directory / "dataset_dict.json").is_file():
        splits = card(directory / "dataset_dict.json", "splits")
        wanted = TRAINED if option == "data.train_file" else HELD_OUT
        split = next((each for each in wanted if each in splits), None)
        if split is None:
            advice = f"name one of them: {path.rstrip('/')}/{splits[0]}"
            raise UserError(f"{path}: a dataset of {', '.join(splits)}; {advice}")
        directory /= split
    if (directory / "state.json").is_file():
        return [str(directory / each["filename"]) for each in card(directory / "state.json", "_data_files")]
    found = []
    for each in sorted(directory.rglob("*")):
        parts = each.relative_to(directory).parts
        if each.is_file() and known(each.name) and each.name not in CARDS and not any(p.startswith(".") for p in parts):
            found.append(str(each))
    if not found:
        raise UserError(f"{path}: the directory holds no file of a known format ({', '.join(READERS)})")
    check_splits(path, found, option, directory)
    return found


def card(file: Path, key: str) -> Any:
    """What a file of `save_to_disk` tells about its dataset."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"no {key!r} can be read in it ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{file}: {found}; save the dataset again, or name its files") from error


def check_splits(path: str, found: list[str], option: str, directory: Path | None = None) -> None:
    """Raise UserError where files are the training and the held-out split of one dataset, by their names."""
    sides: dict[str, dict[bool, str]] = {}
    for each in found:
        name = Path(each).relative_to(directory).as_posix() if directory else Path(each).name
        words = re.findall("[a-z]+", re.sub("(held|hold)[-_ ]?out", "heldout", name.lower()))
        side = next((word for word in words if word in TRAINED + HELD_OUT), None)
        if side:
            rest = " ".join(word for word in words if word != side)
            sides.setdefault(rest, {})[side in TRAINED] = each
    for files in sides.values():
        if len(files) > 1:
            meant = "to train on" if option == "data.train_file" else "to measure on"
            advice = f"name those {meant}, such as {files[option == 'data.train_file']}, or all of them, file by file"
            raise UserError(f"{path}: holds {files[True]} and {files[False]}, which is to be held out; {advice}")


def kind(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def known(path: str) -> bool:
    return kind(path) in READERS


def stem(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).stem


def is_hub_name(path: str) -> bool:
    """owner/name, with :configuration and @split where wanted. A path whose directory is there is a slip of the pen."""
    name = path.partition("@")[0].partition(":")[0]
    there = Path(path).expanduser().exists() or Path(name).parent.is_dir() or path.startswith((".", "/", "~"))
    return name.count("/") == 1 and not there and not known(name) and not glob.has_magic(name)


def rows_of_hub(path: str, option: str) -> Iterator[Row]:
    name, _, split = path.partition("@")
    name, _, configuration = name.partition(":")
    where = f"{option} {path!r}: there is no such file or directory, and as a dataset of a hub"
    if not split and option != "data.train_file":
        raise UserError(f"{where} it needs the split that is meant: {path}@test")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where} {missing('datasets', extra='hub')}") from error
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # of many kinds: no network, no such name, a configuration or a split is to be named
        advice = "give a file, or owner/name, owner/name:configuration@split of a hub in reach"
        raise UserError(f"{where} it cannot be loaded: {first_line(error)}; {advice}") from error
    for number, value in enumerate(rows, start=1):
        yield Row(f"{name}:{number}", name.rpartition("/")[2], value, True)


def read_jsonl(stream: BinaryIO, path: str) -> Numbered:
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig").strip()
            if text:
                yield number, json.loads(text)
        except UnicodeDecodeError as error:
            yield number, UserError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start}")
        except (json.JSONDecodeError, RecursionError) as error:
            found = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "nested too deeply"
            yield number, UserError(f"{path}:{number}: not valid JSON ({found}); each line is one object")


def read_json(stream: BinaryIO, path: str) -> Numbered:
    data = stream.read()
    try:
        value = json.loads(decoded(data, path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines of JSON under another name
            yield from read_jsonl(io.BytesIO(data), path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    if isinstance(value, dict):
        lists = {name: each for name, each in value.items() if isinstance(each, list)}
        if len(lists) == 1 and all(isinstance(each, dict) for each in next(iter(lists.values()))):
            held = next(iter(lists.values()))
            turns = any("role" in each or "from" in each for each in held)
            value = [value] if turns else held  # one row, whose chat it is
    if not isinstance(value, list):
        found = f"an object with {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path}: expected a list of objects, or an object that holds one such list, found {found}")
    yield from enumerate(value, start=1)


def read_csv(stream: BinaryIO, path: str, delimiter: str = ",") -> Numbered:
    csv.field_size_limit(1 << 30)
    text = io.StringIO(decoded(stream.read(), path), newline="")
    cells = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        start = cells.line_num + 1
        try:
            row = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, UserError(f"{path}:{start}: not valid CSV: {error}")
            continue
        if not row:
            continue
        if names is None:
            names = [each.strip() for each in row]
            if twice := sorted({each for each in names if names.count(each) > 1}):
                raise UserError(f"{path}:{start}: the column {twice[0]!r} is there twice")
        elif len(row) != len(names):
            yield start, UserError(f"{path}:{start}: {len(row)} cells, the first line names {len(names)} columns")
        else:
            yield start, {name: cell if cell.strip() else None for name, cell in zip(names, row)}


def read_tsv(stream: BinaryIO, path: str) -> Numbered:
    return read_csv(stream, path, "\t")


def read_parquet(stream: BinaryIO, path: str) -> Numbered:
    return read_table(stream, path, "parquet", lambda arrow, file: arrow.parquet.ParquetFile(file).iter_batches())


def read_arrow(stream: BinaryIO, path: str) -> Numbered:
    def batches(arrow: Any, file: BinaryIO) -> Iterable[Any]:
        if file.read(6) == b"ARROW1":  # a file with a footer, as Feather writes it; datasets writes streams
            reader = arrow.ipc.open_file(file)
            return (reader.get_batch(index) for index in range(reader.num_record_batches))
        file.seek(0)
        return arrow.ipc.open_stream(file)

    return read_table(stream, path, "arrow", batches)


def read_table(stream: BinaryIO, path: str, format: str, batches: Any) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing("pyarrow", f"reading {format} files") from error
    try:
        stream = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        rows = (row for batch in batches(pyarrow, stream) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as {format}: {error}") from error


def decoded(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: {error.reason} at byte {error.start}") from error


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
TABLES = (".parquet", ".arrow")
