"""Rows that are too long: refused, left out, cut."""

import pytest

from srft.config import DataConfig
from srft.data import Example, build_prompter, fit
from srft.errors import UserError
from tests.srft.conftest import byte_tokenizer

LENGTHS = [(5, 3), (60, 3), (5, 80), (70, 3)]
LIMITS = {"train.token_budget": 50, "the model's max_position_embeddings": 60}


def problems(overlong, lengths=LENGTHS, most=30, limits=LIMITS, generated=0):
    prompter = build_prompter(
        byte_tokenizer(None), DataConfig(train_file="x", max_prompt_tokens=most, overlong=overlong)
    )
    examples = [
        Example([{"role": "user", "content": "p" * (prompt - 2) + "?"}], "d" * (answer - 1), None, "t", source=f"t:{i}")
        for i, (prompt, answer) in enumerate(lengths)
    ]
    return fit(prompter, examples, True, limits, generated)


def sizes(found):
    return [(len(each.prompt), len(each.demonstration)) for each in found]


def test_the_longest_is_refused_and_the_others_counted():
    with pytest.raises(UserError) as error:
        problems("error")
    message = "t:3: the prompt has 70 tokens, data.max_prompt_tokens is 30; raise it or shorten 'ppp"
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(
        '(3 of 4 rows are too long, this one most; data.overlong = "drop" leaves such rows out, "cut" cuts them)'
    )


def test_rows_that_are_left_out(capsys):
    assert sizes(problems("drop")) == [(5, 3)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: data.overlong: 3 of 4 rows are left out; the longest: t:3: the prompt has 70 tokens"
    )
    with pytest.raises(UserError, match=r"t:0: the prompt has 40 .*\(all 1 rows are too long, so nothing is left\)"):
        problems("drop", [(40, 3)])


def test_rows_that_are_cut(capsys):
    found = problems("cut")
    assert sizes(found) == [(5, 3), (30, 3), (5, 45), (30, 3)]
    assert found[1].prompt == problems("error", [(60, 3)], most=99, limits={})[0].prompt[-30:]
    assert found[2].demonstration[-1] != 0 and found[2].example.demonstration == "d" * 45  # that much of it is scored
    assert "3 of 4 rows are cut" in capsys.readouterr().err


def test_room_for_rollouts():
    assert sizes(problems("cut", [(29, 3)], generated=40)) == [(10, 3)]
    assert problems("drop", [(29, 3), (5, 3)], generated=40)[0].example.source == "t:1"
    with pytest.raises(
        UserError, match=r"rollout.max_new_tokens 50: a sequence may have 50 tokens, none is left for a"
    ):
        problems("cut", [(29, 3)], generated=50)


def test_nothing_is_said_where_all_fit(capsys):
    assert len(problems("drop", [(5, 3)])) == 1
    assert capsys.readouterr().err == ""
