"""Examples from files: both formats, and every kind of broken file."""

import json
import shutil

import pytest

from srft.config import DataConfig
from srft.data import Example, digest_of_files, load_examples
from srft.errors import UserError


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def rows(count, offset=0):
    return [{"prompt": f"{i} + 1?", "answer": i + 1, "level": i % 3} for i in range(offset, offset + count)]


def load(path, split="train", count=0, **settings):
    return load_examples(DataConfig(train_file=path, **settings), split, count)


def test_jsonl_columns(tmp_path):
    path = write(tmp_path / "train.jsonl", [*rows(9), "", {"prompt": "p", "demonstration": "d #### 1", "answer": None}])
    examples = {each.prompt: each for each in load(path) + load(path, "eval")}
    assert examples["3 + 1?"] == Example(
        [{"role": "user", "content": "3 + 1?"}], None, "4", "train", {"level": 0}, f"{path}:4"
    )
    assert examples["p"].demonstration == "d #### 1" and examples["p"].answer is None
    assert examples["p"].source == f"{path}:11"  # the blank line counts


def test_chats_and_their_demonstrations(tmp_path):
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chats = [[user], [user, assistant, user], [{"role": "system", "content": "s"}, user, assistant]]
    path = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats] + [{"prompt": [user], "x": 1}])
    found = load(path) + load(path, "eval")
    assert all(each.messages[-1]["role"] == "user" for each in found)
    assert [each.demonstration for each in found if each.messages[0]["role"] == "system"] == ["a"]
    assert [each.prompt for each in found if len(each.messages) == 3] == [[user, assistant, user]]


def test_parquet_is_the_same_as_jsonl(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = [{**row, "answer": str(row["answer"])} for row in rows(20)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train.parquet")
    path = write(tmp_path / "train.jsonl", table)
    for split in ("train", "eval"):
        ours, theirs = load(str(tmp_path / "train.parquet"), split), load(path, split)
        assert [(each.messages, each.answer, each.columns) for each in ours] == [
            (each.messages, each.answer, each.columns) for each in theirs
        ]


def test_parquet_chats(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]} for i in range(4)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train.parquet")
    assert {each.demonstration for each in load(str(tmp_path / "train.parquet"))} == {"a"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a"', ":2: not valid JSON (Expecting ',' delimiter at column 15); each line is one object"),
        ("[1]", ":2: expected an object with named columns, found list"),
        (
            '{"text": "a", "answer": 1}',
            ":2: the column 'prompt' or 'messages' is missing; found columns: text, answer",
        ),
        ('{"prompt": " "}', ":2: prompt: expected text or a list of turns, found ' '"),
        ('{"prompt": 5}', ":2: prompt: expected text or a list of turns, found 5"),
        ('{"messages": []}', ":2: messages: expected text or a list of turns, found []"),
        ('{"messages": [{"role": "user"}]}', ':2: messages: a turn is {"role": text, "content": text}, found '),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', ":2: messages have no user turn to answer"),
        ('{"prompt": "a", "demonstration": 5}', ":2: demonstration: expected text or null, found 5"),
        ('{"prompt": "a", "answer": [5]}', ":2: answer: expected text or a number, found [5]"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
            ' "demonstration": "c"}',
            ":2: messages end in an assistant turn and there is a demonstration too; keep one of them",
        ),
    ],
)
def test_broken_lines_are_named(tmp_path, line, expected):
    path = write(tmp_path / "train.jsonl", [{"prompt": "fine"}, line, {"prompt": "fine too"}])
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(path + expected)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"train.jsonl:2: not UTF-8 text: invalid start byte at byte 12"):
        load(str(tmp_path / "train.jsonl"))


def test_files_that_cannot_be_used(tmp_path):
    for name, content, expected in [
        ("none.jsonl", None, "none.jsonl: there is no such file"),
        ("data.txt", "", "data.txt: expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet, .arrow, each"),
        ("empty.jsonl", "\n", "empty.jsonl: the file has no rows; each one needs a prompt or messages"),
        ("broken.parquet", "no parquet", "broken.parquet: cannot be read as parquet: "),
        ("one.jsonl", '{"prompt": "a"}\n', "one.jsonl: nothing is left to train on: it has one prompt, two are needed"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            load(str(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / expected))


def test_the_digest_of_files_is_that_of_their_bytes_wherever_they_lie(tmp_path):
    one, two = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(2, 5))
    (tmp_path / "shards").mkdir()
    for file in (one, two):
        shutil.copy(file, tmp_path / "shards")

    def of(train, held_out=None):
        return digest_of_files(DataConfig(train_file=train, eval_file=held_out))

    assert of([one, two]) == of(str(tmp_path / "shards")) == of(str(tmp_path / "shards" / "*.jsonl")) != of([two, one])
    assert len({of(one), of(two), of([one, two]), of(one, two), of(two, one)}) == 5
    whole, both = write(tmp_path / "c.jsonl", [*rows(3), *rows(2, 5)]), of(one, two)
    assert of(whole) != of([one, two])  # rows that move from one file to the next are not where they were
    write(tmp_path / "b.jsonl", rows(2, 6))
    assert of(one, two) != both and of(None) == of("owner/name") == ""
