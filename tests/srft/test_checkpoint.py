import threading

import pytest
import torch
from safetensors import SafetensorError

from srft import checkpoint
from srft.config import ModelConfig
from srft.errors import UserError
from srft.model import load_model
from srft.ranks import Ranks


def test_a_checkpoint_loads_as_the_same_model(tiny, tmp_path):
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight.mul_(1.5)
    path = checkpoint.save(tiny, tmp_path / "run" / "checkpoint-3")
    again = load_model(ModelConfig(path=str(path), device="cpu"))
    assert {n: p.tolist() for n, p in again.model.named_parameters()} == {
        n: p.tolist() for n, p in tiny.model.named_parameters()
    }
    assert again.tokenizer.encode("2 + 3") == tiny.tokenizer.encode("2 + 3")
    assert again.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert (path / "model.safetensors").is_file()
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failed_save_is_told_leaves_nothing_and_does_not_disturb_the_next(tiny, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny.tokenizer), "save_pretrained", full)
        with pytest.raises(UserError, match=r"checkpoint: .*final could not be written: .*No space left on device"):
            checkpoint.save(tiny, tmp_path / "final")
    assert not list(tmp_path.iterdir())
    assert checkpoint.save(tiny, tmp_path / "final").is_dir()


def test_a_state_that_cannot_be_written_leaves_the_last_checkpoint_whole(tiny, tmp_path):
    checkpoint.save(tiny, tmp_path / "checkpoint-1", state={"moment": torch.ones(3)})
    with pytest.raises(UserError, match=r"checkpoint-2 could not be written: .*pickle"):
        checkpoint.save(tiny, tmp_path / "checkpoint-2", state={"moment": threading.Lock()})
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoint.read_state(state := {"moment": torch.zeros(3)}, tmp_path / "checkpoint-1" / "state", Ranks())
    assert state["moment"].tolist() == [1, 1, 1]


def test_the_end_of_a_process_within_a_save_leaves_the_last_checkpoint_whole(tiny, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(state, directory, ranks):
        directory.mkdir()
        (directory / "half").touch()
        raise Killed

    state = {"moment": torch.ones(3)}
    checkpoint.save(tiny, tmp_path / "checkpoint-1", state=state)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_state", killed)
        checkpoint.save(tiny, tmp_path / "checkpoint-2", state=state)
    assert checkpoint.resumable(str(tmp_path)) == tmp_path / "checkpoint-1"
    assert load_model(ModelConfig(str(tmp_path / "checkpoint-1"), device="cpu"))
    checkpoint.save(tiny, tmp_path / "checkpoint-2", state=state)
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert checkpoint.resumable(str(tmp_path)) == tmp_path / "checkpoint-2"


def test_the_newest_checkpoint_with_a_state_is_found(tmp_path):
    for name in ("checkpoint-9/state", "checkpoint-10/state", "checkpoint-11", ".checkpoint-12.partial/state"):
        (tmp_path / name).mkdir(parents=True)
    assert checkpoint.resumable(str(tmp_path)) == tmp_path / "checkpoint-10"
    assert checkpoint.resumable(str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    assert checkpoint.step_of(tmp_path / "checkpoint-9") == 9
    with pytest.raises(UserError, match=r"--resume .*run.checkpoint_every; there is no such directory"):
        checkpoint.resumable(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"only its newest checkpoint keeps a state .*: --resume .*/checkpoint-10$"):
        checkpoint.resumable(str(tmp_path / "checkpoint-11"))
    with pytest.raises(UserError, match="called checkpoint-N"):
        checkpoint.step_of(tmp_path / "renamed")


def test_a_run_without_a_state_is_told_how_to_go_on_from_its_model(tiny, tmp_path):
    with pytest.raises(UserError, match=r"found no checkpoint-N with a state in it$"):
        checkpoint.resumable(str(tmp_path))
    model = checkpoint.save(tiny, tmp_path / "interrupted-23")
    for given in (tmp_path, model):
        with pytest.raises(UserError, match=r"holds the model only: .* --model\.path (\S*/interrupted-23)$") as error:
            checkpoint.resumable(str(given))
        assert load_model(ModelConfig(str(error.value).split()[-1], device="cpu"))


def test_an_existing_checkpoint_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match="exists already"):
        checkpoint.save(tiny, tmp_path / "final")


def kept(run) -> list[int]:
    return sorted(int(each.name[11:]) for each in run.glob("checkpoint-[0-9]*"))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for step in range(1, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    for name in ("final", "checkpoint-mine", "interrupted-3", ".checkpoint-1.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-1" / "state").mkdir()  # what --resume needs
    checkpoint.prune(tmp_path, 2, {0: 0.9, 2: 0.3, 3: 0.3, 4: float("nan")})
    assert kept(tmp_path) == [1, 3, 5, 6]  # of two that are equally good, the later one
    assert {each.name for each in tmp_path.iterdir() if "checkpoint-" not in each.name} == {"final", "interrupted-3"}
    assert (tmp_path / "checkpoint-mine").is_dir() and not list(tmp_path.glob(".*"))
    checkpoint.prune(tmp_path, 1, {})
    assert kept(tmp_path) == [1, 6]


def test_the_newest_model_is_the_one_that_was_saved_last(tiny, tmp_path):
    """Not the one whose state went when a newer was saved."""
    for step in (1, 2):
        checkpoint.save(tiny, tmp_path / f"checkpoint-{step}", Ranks(), {"x": torch.zeros(1)})
    assert not (tmp_path / "checkpoint-1" / "state").exists()
    assert checkpoint.newest_model(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-1" / "config.json").touch()  # as a copy of the run may have it
    assert checkpoint.newest_model(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2").rename(tmp_path / "interrupted-11")
    assert checkpoint.newest_model(tmp_path) == tmp_path / "interrupted-11"
