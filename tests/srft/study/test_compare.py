"""`srft compare`: what it prints and writes, and that its records give the same again."""

import json
import re
from pathlib import Path

import pytest

from srft.cli import main
from srft.errors import UserError
from srft.study import load_study, main_compare, run_study
from srft.study.compare import name_of
from srft.study.record import written
from tests.srft.study.conftest import JOB
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


STUDIES = Path(__file__).parents[3] / "studies"


@pytest.mark.parametrize("study", sorted(each.parent.name for each in STUDIES.glob("*/comparison.json")))
def test_what_is_told_of_our_studies_is_what_their_records_give(study, tmp_path):
    main_compare([str(STUDIES / study)], directory=str(tmp_path))
    for name in ("comparison.json", "table.md"):
        assert (tmp_path / name).read_text() == (STUDIES / study / name).read_text()


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


def test_nothing_of_others_is_written_over(made, tmp_path, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for where, message in (("site", "site is not empty, and no comparison is in it"), ("file", "file is a file")):
        assert main(["compare", "made", "--dir", where]) == 2 and message in capsys.readouterr().err
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_a_comparison_made_again_in_its_place_keeps_what_is_in_it(made):
    """What was not finished is still told, and a record is left as somebody wrote it."""
    told = json.loads((made / "comparison.json").read_text())
    (made / "comparison.json").write_text(json.dumps({**told, "missing": ["luffy-0"]}))
    noted = {**json.loads((made / "runs" / "hpt-0.json").read_text()), "note": "mine"}
    (made / "runs" / "hpt-0.json").write_text(json.dumps(noted))
    for _ in range(2):
        main_compare([str(made)])
        assert "Not finished: luffy-0." in (made / "table.md").read_text()
    assert json.loads((made / "runs" / "hpt-0.json").read_text())["note"] == "mine"


def test_a_study_that_has_changed_is_not_compared_as_what_it_is_now(study_file):
    file = study_file('[study]\nmethods = ["sft"]')
    run_study(load_study(file))
    assert list(main_compare([file]).methods) == ["sft"]
    study_file('[study]\nmethods = ["sft"]', JOB.replace("steps = 2", "steps = 500"))
    with pytest.raises(UserError, match=r"sft-0.toml: begun with train.steps 2, now it is 500"):
        main_compare([file])
    assert main_compare(["runs/mine/sft-0"]).methods["sft"].settings["train.steps"] == 2  # as it was


def test_records_of_an_earlier_comparison_do_not_come_back(made, tmp_path):
    some = [str(made / "runs" / f"{method}-{seed}.json") for method in ("sft", "grpo") for seed in range(3)]
    main_compare(some, directory="other")
    main_compare(some[:3], directory="other")
    assert list(main_compare(["other"]).methods) == ["sft"]


def test_a_comparison_is_against_the_same_again(made):
    assert main_compare([str(made)], "grpo").against == "grpo"
    assert main_compare([str(made)]).against == "grpo"


def test_a_study_as_a_directory_and_several_together(made, tmp_path, capsys):
    """Each method has the study's name first; a base that is the same is there once."""
    base = {**a_record("base", 0, [a_set("sums", rewards(1))]), "steps": [], "curve": []}
    for study, right in (("few", 3), ("many", 8)):
        directory = tmp_path / study
        (directory / "runs").mkdir(parents=True)
        records = [base, *(a_record("sft", seed, [a_set("sums", rewards(right))]) for seed in range(2))]
        for record in records:
            (directory / "runs" / f"{name_of(record)}.json").write_text(written(record))
        (directory / "comparison.json").write_text(json.dumps({"runs": [name_of(record) for record in records]}))
    found = main_compare(["few", "many"], directory="both")
    assert list(found.methods) == ["few.sft", "many.sft", "base"]
    assert found.outcome.cells("few.sft")["many.sft"].difference.mean == pytest.approx(0.5)
    (tmp_path / "deep").mkdir()
    for study in ("few", "many"):  # beside their runs, each in a directory of the same name
        (tmp_path / study).rename(tmp_path / "deep" / study)
        (tmp_path / study).mkdir()
        (tmp_path / "deep" / study).rename(tmp_path / study / "comparison")
    found = main_compare(["few/comparison", "many/comparison", "few/comparison/runs/sft-0.json"], directory="both")
    assert list(found.methods) == ["few.sft", "many.sft", "sft", "base"]
    assert list(main_compare(["both"]).methods) == ["few.sft", "many.sft", "sft", "base"]  # their names can be read
    with pytest.raises(UserError, match="the same twice"):
        main_compare(["few/comparison", "few/comparison"], directory="both")
    for study in ("few", "many"):
        (tmp_path / study / "comparison").rename(tmp_path / "deep" / study)
        (tmp_path / study).rmdir()
        (tmp_path / "deep" / study).rename(tmp_path / study)
    (tmp_path / "many" / "runs" / "base.json").write_text(written({**base, "sets": [a_set("sums", rewards(2))]}))
    with pytest.raises(UserError, match="their bases are not the same model, or were measured in different ways"):
        main_compare(["few", "many"], directory="both")


def test_names_that_mean_something_to_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("_a", "$x$", "<script>"):
        (tmp_path / f"{len(method)}.json").write_text(written(a_record(method, 0, [a_set("sums", rewards(4))])))
    main_compare(["2.json", "3.json", "8.json"], directory="d")
    page = (tmp_path / "d" / "index.html").read_text()
    Checker().feed(page)
    assert "<script>" not in page and page.count("> _a</text>") >= 4
