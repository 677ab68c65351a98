import pytest

from srft.analysis.models import BASE, subject, subjects
from srft.errors import UserError


def model_at(directory):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")


def test_of_a_run_its_last_model_and_checkpoints_that_lead_to_it(tmp_path):
    run = tmp_path / "sft-0"
    for step in (2, 10, 4, 6, 8):
        model_at(run / f"checkpoint-{step}")
    model_at(run / "checkpoint-old")
    model_at(run / "final")
    found = subject(str(run), most=10)
    assert (found.name, found.path) == ("sft-0", str(run / "final"))
    assert list(found.checkpoints) == [2, 4, 6, 8, 10]
    assert list(subject(str(run), most=2).checkpoints) == [2, 6] and not subject(str(run)).checkpoints


def test_of_a_run_that_was_stopped_the_newest_checkpoint_is_the_model(tmp_path):
    model_at(tmp_path / "run" / "checkpoint-2")
    found = subject(str(tmp_path / "run"), most=8)
    assert found.path.endswith("checkpoint-2") and not found.checkpoints


def test_models_of_one_name_are_called_by_their_paths(tmp_path, monkeypatch):
    for each in ("a/final", "b/final", "base"):
        model_at(tmp_path / each)
    paths = [str(tmp_path / each) for each in ("a/final", "b/final", "base")]
    assert [each.name for each in subjects("smollm2", paths, 0)] == [BASE, *paths]
    model_at(tmp_path / "demonstrations")
    monkeypatch.chdir(tmp_path)
    names = ["base", "demonstrations"]
    assert [each.name for each in subjects("smollm2", names, 0)] == [BASE, *(str(tmp_path / each) for each in names)]
    assert [each.name for each in subjects("smollm2", ["smollm2", "org/model"], 0)] == [BASE, "smollm2", "model"]
    with pytest.raises(UserError, match="named twice; name each model once"):
        subjects("smollm2", [paths[0], paths[0]], 0)
    with pytest.raises(UserError, match="named twice; name each model once"):
        subjects("smollm2", ["demonstrations", "demonstrations/"], 0)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_what_is_no_model_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a directory of a run or of a model"):
        subject(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: there is no model in it; name the directory of a run"):
        subject("empty")
