"""What a path means, and a reader for each format."""

import gzip
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from srft.data.rows import read_rows
from srft.errors import UserError

INPUTS = Path(__file__).parents[2] / "data"
LINES = [{"prompt": str(i), "answer": i} for i in range(3)]


def jsonl(lines=LINES):
    return "".join(json.dumps(each) + "\n" for each in lines)


def values(path, option="data.train_file"):
    return [row.value for row in read_rows(str(path), option)]


def refusal(path, option="data.train_file"):
    with pytest.raises(UserError) as error:
        values(path, option)
    return str(error.value)


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "list.json", "table.csv", "verl.parquet"])
def test_each_format_also_compressed(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write((INPUTS / name).read_bytes())
    packed = list(read_rows(str(tmp_path / f"{name}.gz")))
    assert [row.value for row in packed] == values(INPUTS / name)
    assert packed[0].task == name.split(".")[0] and packed[0].source.startswith(f"{tmp_path}/{name}.gz:")


def test_tables_of_text(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tanswer\n\nWhat?\t5\n")
    (row,) = read_rows(str(tmp_path / "a.tsv"))
    assert (row.value, row.source) == ({"prompt": "What?", "answer": "5"}, f"{tmp_path}/a.tsv:3")
    (tmp_path / "b.csv").write_text('prompt,answer\n"two\nlines",5\nshort\n"x",\n')
    long, short, blank = read_rows(str(tmp_path / "b.csv"))
    assert long.value["prompt"] == "two\nlines" and blank.value == {"prompt": "x", "answer": None}
    assert str(short.value) == f"{tmp_path}/b.csv:4: 1 cells, the first line names 2 columns"


def test_json_of_several_shapes(tmp_path):
    file = tmp_path / "a.json"
    for text in (json.dumps(LINES), json.dumps({"version": 1, "data": LINES}), jsonl()):
        file.write_text(text)
        assert values(file) == LINES
    file.write_text(json.dumps({"a": LINES, "b": LINES}))
    assert refusal(file) == (
        f"{file}: expected a list of objects, or an object that holds one such list, found an object with a, b"
    )
    file.write_text('[\n{"a": 1},\n{"a" 2}]')
    assert refusal(file).startswith(f"{file}:3: not valid JSON (Expecting ':' delimiter at column 6)")


def test_byte_order_marks_of_joined_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + jsonl()).encode() * 2)
    assert values(tmp_path / "a.jsonl") == LINES * 2


def test_directories_globs_and_their_order(tmp_path):
    for index in (2, 0, 1):
        (tmp_path / f"part-{index}.jsonl").write_text(jsonl([LINES[index]]))
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    assert values(tmp_path) == values(tmp_path / "part-*.jsonl") == values(f"{tmp_path}/**/part*") == LINES
    assert [row.source for row in read_rows(str(tmp_path))] == [f"{tmp_path}/part-{i}.jsonl:1" for i in range(3)]
    assert {row.task for row in read_rows(str(tmp_path))} == {tmp_path.name}  # shards are one task
    assert {row.task for row in read_rows(f"{tmp_path}/part-*.jsonl")} == {"part"}
    assert refusal(tmp_path / "x*.jsonl").startswith(f"{tmp_path}/x*.jsonl: no file of a known format has such a name")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path}/empty: the directory holds no file of a known format")


def test_a_directory_of_several_splits_is_not_mixed(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000-of-00001.jsonl").write_text(jsonl())
    told = refusal(tmp_path)
    assert (
        f"test-00000-of-00001.jsonl, which is to be held out; name those to train on, such as {tmp_path}/train-" in told
    )


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["gsm8k_train", "gsm8k_test"], True),
        (["train", "held_out"], True),
        (["trainset", "testset"], True),
        (["data/training", "data/evaluation"], True),
        (["train_math", "unit_test_generation"], False),
        (["math/train", "code/test_writing"], False),
        (["gsm8k_train", "valid_parentheses"], False),
        (["val", "valid"], False),
    ],
)
def test_splits_of_one_dataset(tmp_path, names, refused):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(jsonl())
    if refused:
        assert "is to be held out" in refusal(tmp_path)
    else:
        assert len(values(tmp_path)) == 2 * len(LINES)


@pytest.fixture
def saved(tmp_path):
    """Two splits as `datasets.DatasetDict.save_to_disk` writes them: Arrow streams, listed in state.json."""
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, lines in (("train", LINES), ("test", LINES[:1])):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (tmp_path / split / "dataset_info.json").write_text("{}")
        table = pyarrow.Table.from_pylist(lines)
        with pyarrow.ipc.new_stream(str(tmp_path / split / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
    return tmp_path


def test_datasets_that_were_saved(saved):
    assert values(saved) == values(saved / "train") == LINES
    assert values(saved, "data.eval_file") == values(saved / "test") == LINES[:1]
    shutil.rmtree(saved / "test")
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert refusal(saved, "data.eval_file") == f"{saved}: a dataset of train; name one of them: {saved}/train"


def test_feather_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(LINES)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert values(tmp_path / "a.arrow") == LINES


def test_files_that_are_broken(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(jsonl().encode())
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    assert refusal(tmp_path / "cut.jsonl.gz").startswith(f"{tmp_path}/cut.jsonl.gz: cannot be read: ")
    (tmp_path / "no.jsonl.gz").write_text(jsonl())
    assert refusal(tmp_path / "no.jsonl.gz").startswith(f"{tmp_path}/no.jsonl.gz: cannot be read: Not a gzipped file")
    (tmp_path / "latin.csv").write_bytes("prompt\nÄpfel\n".encode("latin-1"))
    assert refusal(tmp_path / "latin.csv").startswith(f"{tmp_path}/latin.csv:2: not UTF-8 text")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    assert refusal(tmp_path / "twice.csv") == f"{tmp_path}/twice.csv:1: the column 'prompt' is there twice"


def test_a_dataset_of_a_hub(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name.startswith("far"):
            raise ConnectionError("Couldn't reach the hub\nmore")
        return LINES

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert values("openai/gsm8k:main@test") == values("openai/gsm8k") == LINES
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train")]
    assert next(read_rows("openai/gsm8k")).source == "openai/gsm8k:1"
    assert "cannot be loaded: Couldn't reach the hub; give a file, or owner/name" in refusal("far/away")
    expected = (
        "data.eval_file 'openai/gsm8k': there is no such file or directory, and as a dataset of a hub it needs the"
    )
    assert refusal("openai/gsm8k", "data.eval_file").startswith(expected)


def test_a_dataset_of_a_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("openai/gsm8k") == (
        "data.train_file 'openai/gsm8k': there is no such file or directory, and as a dataset of a hub "
        "the package 'datasets' is needed: pip install 'srft-kernels[hub]'"
    )
