"""Rewards of a user, in a module in the current directory."""

import sys

import pytest

from srft.config import DataConfig, RewardConfig
from srft.data import Example
from srft.rewards import Scorer, build_reward

FILE = DataConfig(train_file="train.jsonl")


def example(answer=None, prompt="2 + 2?", **columns):
    return Example([{"role": "user", "content": prompt}], "4", answer, "train", columns)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(source, workers=…, …): the scorer of `reward` in a module of that source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    module = "module_" + tmp_path.name

    def scorer_of(source: str, function: str | list[str] = "reward", **settings) -> Scorer:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        names = [f"{module}:{each}" for each in ([function] if isinstance(function, str) else function)]
        return build_reward(RewardConfig(names[0] if len(names) == 1 else names, **settings), FILE)

    return scorer_of
