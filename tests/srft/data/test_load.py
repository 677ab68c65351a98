"""Which examples are trained on, and which are held out."""

import json

import pytest

from srft.config import DataConfig
from srft.data import Example, load_examples, load_sides
from srft.data.examples import prompt_hash
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


def test_only_the_first_so_many_keep_their_demonstration(tmp_path):
    lines = [{**row, "demonstration": None} if place % 3 == 0 else row for place, row in enumerate(rows(40))]
    path = write(tmp_path / "train.jsonl", lines)
    whole, few = load(path), load(path, demonstrations=4)
    assert [each.messages for each in few] == [each.messages for each in whole]
    shown = [each for each in few if each.demonstration is not None]
    assert shown == [each for each in whole if each.demonstration is not None][:4]
    held_out = load(path, "eval")
    assert load(path, "eval", demonstrations=4) == held_out  # they are measured by what they have
    config = DataConfig(train_file=path, demonstrations=4)
    assert load_sides(config, 20, 3) == (few[:20], held_out[:3])
    made = DataConfig(demonstrations=2)
    assert [each.demonstration is None for each in load_sides(made, 5, 2)[0]] == [False] * 2 + [True] * 3
    assert all(each.demonstration is None for each in load(path, demonstrations=0))


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


def test_several_files_and_one_order(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", rows(12, offset)) for name, offset in (("a", 0), ("b", 12))]
    both = write(tmp_path / "both.jsonl", rows(24))
    train = load(paths)
    assert [each.prompt for each in train] == [each.prompt for each in load(both)]
    assert {each.task for each in train} == {"a", "b"}
    assert [load(paths, count=count) for count in (1, 7)] == [train[:1], train[:7]]


def test_a_chat_goes_to_one_side_with_all_of_its_turns(tmp_path):
    chats = [
        [turn(role, f"{number}.{place}") for place, role in enumerate(["user", "assistant"] * 2)]
        for number in range(16)
    ]
    path = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    train, held_out = (load(path, side, turns="all") for side in ("train", "eval"))
    assert len(held_out) == 2 and all(len(each.messages) == 3 for each in held_out)
    apart = {each.source for each in held_out}
    assert len(train) == 28 and not apart & {each.source for each in train}
    assert {each.demonstration[-1] for each in train} == {"1", "3"}


def turn(role, content):
    return {"role": role, "content": content}


def test_broken_rows_are_left_out_where_that_is_wanted(tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [*rows(9), "{", {"prompt": 5}])
    assert len(load(path, broken="drop")) == 8
    expected = f"warning: {path}: 2 of 11 rows are broken and left out, the first: {path}:10: not valid JSON"
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(
        UserError, match=r"train.jsonl:10: .* \(the first of 2 broken rows; `srft data check` names all"
    ):
        load(path)
    with pytest.raises(UserError, match=r"train.jsonl:1: not valid JSON"):
        load(write(tmp_path / "train.jsonl", ["{"]), broken="drop")


def test_columns_of_other_names_are_told(tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [{"question": str(i), "answer": f"so\n#### {i}"} for i in range(9)])
    load_sides(DataConfig(train_file=path), 0, 0)
    assert capsys.readouterr().out == f"{path}: prompt from 'question'; demonstration from 'answer'\n"


def test_a_date_in_a_turn_makes_no_other_prompt(tmp_path):
    """Else a prompt would be trained on and held out."""
    turns = [{"role": "user", "content": f"q{i % 20}", "turn_identifier": i} for i in range(80)]
    path = write(tmp_path / "wild.jsonl", [{"messages": [turn], "demonstration": "a"} for turn in turns])
    train, held_out = load(path), load(path, "eval")
    assert not {each.messages[0]["content"] for each in train} & {each.messages[0]["content"] for each in held_out}


@pytest.mark.parametrize("given", ["", " ", [], [""]])
def test_an_empty_name_of_a_file_is_not_taken_for_none(given):
    for option in ("train_file", "eval_file"):
        with pytest.raises(UserError, match=f"data.{option}: expected the name of a file, found"):
            load_examples(DataConfig(**{option: given}), "train")


def test_ids_of_calls_make_no_other_prompt():
    calls = [[{"id": id, "function": {"name": "add", "arguments": {}}}] for id in ("a1", "b2")]
    turns = [{"role": "assistant", "content": content, "tool_calls": each} for content, each in zip((None, ""), calls)]
    one, other = (prompt_hash(Example([turn], None, None, "t")) for turn in turns)
    assert one == other != prompt_hash(Example([{**turns[0], "tool_calls": []}], None, None, "t"))


def test_the_hash_of_a_prompt_stays_what_it_is():
    """Which prompts are held out follows from it, and with that every number that was ever measured."""
    plain = Example([{"role": "user", "content": "2 + 2?"}], None, None, "t")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "π"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert prompt_hash(plain) == 5621354116171583489
    assert prompt_hash(Example(chat, "a demonstration", "an answer", "t", tools=tools)) == 18329291312382112838
