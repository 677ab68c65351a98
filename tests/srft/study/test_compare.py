"""`srft compare`: what it prints and writes, and that its records give the same again."""

import json
import re

import pytest

from srft.cli import main
from srft.errors import UserError
from srft.study import main_compare
from srft.study.record import read_record, written
from tests.srft.study.records import a_record, a_set
from tests.srft.test_report import Checker


def rewards(right: int) -> list[list[float]]:
    return [[float(prompt < right), float(prompt < right - 1)] for prompt in range(10)]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A directory of records, as `srft compare` writes it."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "made" / "runs"
    directory.mkdir(parents=True)
    for method, right in (("srft_<b>", 4), ("sft", 9), ("grpo", 4)):
        for seed in range(3):
            sets = [a_set("sums", rewards(right + seed % 2)), a_set("w|rds", rewards(2), "others")]
            (directory / f"{method}-{seed}.json").write_text(written(a_record(method, seed, sets)))
    (directory / "hpt-0.json").write_text(written(a_record("hpt", 0, [a_set("sums", rewards(5))], lr=1e-3)))
    order = [f"{method}-{seed}" for method in ("srft_<b>", "sft", "grpo") for seed in range(3)] + ["hpt-0"]
    (tmp_path / "made" / "comparison.json").write_text(json.dumps({"runs": order}))
    return tmp_path / "made"


def test_the_table_the_files_and_the_page(made, capsys):
    main_compare([str(made)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["method", "seeds", "avg@2", "95"] and printed[0].endswith("seconds")
    assert [line.split()[0] for line in printed[1:5]] == ["sft", "hpt", "srft_<b>", "grpo"]
    assert re.search(r"^sft +3 +0\.8\d\d .*\+0\.500 +\+0\.\d+ … \+0\.\d+ +better ", printed[1])
    assert "Fewer than three seeds: hpt. How" in "\n".join(printed) and "commit abc; 2 × a processor" in "\n".join(
        printed
    )
    table = (made / "table.md").read_text()
    assert table.startswith("| method | seeds | avg@2 |") and "w\\|rds" in table
    numbers = json.loads((made / "comparison.json").read_text())
    assert numbers["against"] == "srft_<b>" and numbers["runs"][-1] == "hpt-0"
    assert numbers["columns"][0]["methods"]["sft"]["verdict"] == "better"
    page = (made / "index.html").read_text()
    Checker().feed(page)
    assert "<b>srft_&lt;b&gt;</b>" in page and "Held-out reward over seconds" in page and "Each against each" in page
    assert "<code>train.lr</code> 0.001" in page


def test_records_give_the_same_again(made, tmp_path):
    main_compare([str(made)])
    main_compare([str(made)], directory=str(tmp_path / "again"))
    for name in ("table.md", "comparison.json"):
        assert (made / name).read_text() == (tmp_path / "again" / name).read_text()
    files = sorted(made.glob("runs/*.json"))
    main_compare([str(file) for file in sorted(files)], "srft_<b>", str(tmp_path / "third"))
    table = [(each / "table.md").read_text().splitlines() for each in (made, tmp_path / "third")]
    assert sorted(table[0]) == sorted(table[1])  # methods that are equally good are in the order of the files
    assert all(file.read_text() == (tmp_path / "third" / "runs" / file.name).read_text() for file in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes a study, runs, or a directory"),
        (["nowhere"], "nowhere: there is no such run, study or record"),
        (["made/runs"], "made/runs: expected a directory of a run, of a study"),
        (["made", "--agains", "sft"], "unknown option --agains"),
        (["made", "--against", "stf"], "there is no such method; did you mean 'sft'"),
        (["made/broken.json"], "broken.json: cannot be read as a record"),
        (["made/list.json"], "list.json: not a record of a run, .*: it is no JSON object"),
        (["made/comparison.json"], "comparison.json: not a record of a run, .*: method: expected str, found None"),
    ],
)
def test_what_is_no_run_is_refused(made, capsys, arguments, message):
    (made / "broken.json").write_text("{")
    (made / "list.json").write_text("[]")
    assert main(["compare", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_record_comes_back_from_its_file(tmp_path):
    record = a_record("sft", 1, [a_set("sums", [[1, 0.5]])])
    (tmp_path / "sft-1.json").write_text(written(record))
    assert read_record(tmp_path / "sft-1.json") == json.loads(json.dumps(record))
    (tmp_path / "none.json").write_text(written({**record, "steps": [], "sets": []}))
    assert read_record(tmp_path / "none.json")["steps"] == []
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path / "absent.json")
