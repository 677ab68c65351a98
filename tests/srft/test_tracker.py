import math
import sys
import types

import pytest

from srft.config import RunConfig
from srft.errors import UserError
from srft.rundir import RunLog
from srft.tracker import open_trackers, require_packages


@pytest.fixture
def fake(monkeypatch):
    """A module like wandb and trackio, and what it was told."""

    def make(name: str, **functions):
        module, told = types.ModuleType(name), []
        module.init = lambda **given: told.append(("init", given))
        module.log = lambda values, step: told.append((step, values))
        module.finish = lambda: told.append(("finish",))
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv("WANDB_DIR", "")  # put back afterwards
        return told

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_go_to_the_tracker_by_the_names_of_the_file(tmp_path, fake, name):
    told = fake(name)
    config = RunConfig(tracker=name)
    require_packages(config)
    log = RunLog(tmp_path, open_trackers(config, tmp_path, {"train": {"lr": 1.0}}, done=4))
    log.metrics({"step": 5, "loss": 0.5, "clip_fraction": math.nan})
    log.evaluation(5, types.SimpleNamespace(reward=0.25, loss=math.nan, as_dict=lambda: {"reward": 0.25}))
    log.close()
    title = f"{tmp_path.name} from step 4"
    expected = {"project": "srft", "name": title, "group": tmp_path.name, "config": {"train": {"lr": 1.0}}}
    assert told == [("init", expected), (5, {"loss": 0.5}), (5, {"eval/reward": 0.25}), ("finish",)]


def test_a_tracker_that_fails_costs_its_page_and_not_the_run(tmp_path, fake, capsys):
    def broken(values, step):
        raise ConnectionError("gone")

    fake("trackio", log=broken)
    log = RunLog(tmp_path, open_trackers(RunConfig(tracker="trackio", tensorboard=True), tmp_path, {}))
    for step in (1, 2):
        log.metrics({"step": step, "loss": 0.5})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err == "trackio is told nothing from step 1 on: gone\n"
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_does_not_start_is_told(tmp_path, fake):
    def refused(**_):
        raise RuntimeError("no API key\nlog in")

    fake("wandb", init=refused)
    expected = r"^run\.tracker 'wandb': wandb could not be started: no API key; WANDB_MODE=offline .*run\.tracker none"
    with pytest.raises(UserError, match=expected):
        open_trackers(RunConfig(tracker="wandb"), tmp_path, {})


@pytest.mark.parametrize(
    "config, option",
    [
        (RunConfig(tracker="trackio"), r"run\.tracker 'trackio': pip install 'srft-kernels\[trackio\]'"),
        (RunConfig(tensorboard=True), r"run\.tensorboard: pip install 'srft-kernels\[tensorboard\]'"),
    ],
)
def test_a_package_that_is_not_there_is_told(monkeypatch, config, option):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=option):
        require_packages(config)
