"""Which examples are trained on, and which are held out."""

import json

import pytest

from srft.config import DataConfig
from srft.data import load_examples
from srft.errors import UserError

from .test_files import load, rows, write


def prompts(examples):
    return {json.dumps(each.messages) for each in examples}


def test_train_and_eval_share_no_prompt(tmp_path):
    path = write(tmp_path / "train.jsonl", rows(80) + rows(80))
    train, held_out = load(path), load(path, "eval")
    assert not prompts(train) & prompts(held_out)
    assert len(held_out) == len(prompts(held_out)) == 10 and len(train) == 140
    assert prompts(load(path, "eval", seed=5)) == prompts(held_out)
    assert [each.prompt for each in load(path, seed=5)] != [each.prompt for each in train]
    assert load(path, "eval", 4) == held_out[:4]


def test_prompts_of_the_eval_file_are_not_trained_on(tmp_path):
    path, other = write(tmp_path / "train.jsonl", rows(10)), write(tmp_path / "eval.jsonl", rows(10, offset=6))
    assert len(load(path, eval_file=other)) == 6
    assert len(load(path, "eval", eval_file=other)) == 10


def test_an_eval_file_alone(tmp_path):
    with pytest.raises(UserError, match=r"data.train_file: data.eval_file alone was given"):
        load_examples(DataConfig(eval_file=write(tmp_path / "eval.jsonl", rows(2))), "train")


def test_everything_held_out_by_the_eval_file(tmp_path):
    path = write(tmp_path / "train.jsonl", rows(3))
    with pytest.raises(UserError, match=r"nothing is left to train on: every prompt of it is also in data.eval_file"):
        load(path, eval_file=path)
