"""Rows that are too long: refused, left out, cut."""

import pytest

from srft.config import DataConfig
from srft.data import Example, build_prompter, fit
from srft.errors import UserError
from tests.srft.conftest import byte_tokenizer

LENGTHS = [(5, 3), (60, 3), (5, 80), (70, 3)]
LIMITS = {"train.token_budget": 50, "the model's max_position_embeddings": 60}


def problems(overlong, lengths=LENGTHS, most=30, limits=LIMITS, generated=0):
    config = DataConfig(train_file="x", max_prompt_tokens=most, overlong=overlong)
    prompter = build_prompter(byte_tokenizer(None), config)
    examples = [
        Example([{"role": "user", "content": "p" * (prompt - 2) + "?"}], "d" * (answer - 1), None, "t", source=f"t:{i}")
        for i, (prompt, answer) in enumerate(lengths)
    ]
    return fit(prompter, examples, config, True, limits, generated)


def sizes(found):
    return [(len(each.prompt), len(each.demonstration)) for each in found]


def test_the_longest_is_refused_and_the_others_counted():
    with pytest.raises(UserError) as error:
        problems("error")
    message = "t:3: the prompt has 70 tokens, data.max_prompt_tokens is 30; raise it or shorten 'ppp"
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(
        "(3 of 4 examples are too long, this one most; "
        'data.overlong = "drop" leaves such examples out, "cut" cuts them)'
    )


def test_rows_that_are_left_out(capsys):
    assert sizes(problems("drop")) == [(5, 3)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: data.overlong: 3 of 4 examples are left out; the longest: t:3: the prompt has 70 tokens"
    )
    with pytest.raises(
        UserError, match=r"t:0: the prompt has 40 .*\(all 1 examples are too long, so nothing is left\)"
    ):
        problems("drop", [(40, 3)])


def test_rows_that_are_cut(capsys):
    found = problems("cut")
    assert sizes(found) == [(5, 3), (30, 3), (5, 45), (30, 3)]
    assert found[1].prompt == problems("error", [(60, 3)], most=99, limits={})[0].prompt[-30:]
    assert found[2].demonstration[-1] != 0 and found[2].example.demonstration == "d" * 45  # that much of it is scored
    assert "3 of 4 examples are cut" in capsys.readouterr().err


def chat_of(*turns, most, system=""):
    """A chat that is cut, as text."""
    config = DataConfig(train_file="x", max_prompt_tokens=most, overlong="cut", system_prompt=system)
    prompter = build_prompter(byte_tokenizer(), config)
    messages = [{"role": role, "content": content} for role, content in turns]
    (problem,) = fit(prompter, [Example(messages, "d", None, "t")], config, True)
    assert len(problem.prompt) <= most
    assert prompter.encode_prompt(problem.example) == problem.prompt  # what a reward sees is what the model saw
    return prompter.tokenizer.decode(problem.prompt)


def test_what_the_chat_template_writes_is_not_cut():
    whole = chat_of(("user", "q" * 30 + "end"), most=99)
    cut = chat_of(("user", "q" * 30 + "end"), most=len(whole) - 20 - 6)  # a special token has several letters
    header, footer = whole.split("q" * 30 + "end")
    assert cut.startswith(header) and cut.endswith("end" + footer) and 3 < len(cut) < len(whole)


def test_the_first_turns_are_cut_before_the_question_and_characters_stay_whole():
    turns = [("user", "long " * 20), ("assistant", "a short one"), ("user", "the question")]
    cut = chat_of(*turns, most=110, system="Be brief.")
    assert all(text in cut for text in ("Be brief.", "a short one", "the question", "long long"))
    assert "long " * 20 not in cut
    cut = chat_of(("system", "Rules. " * 9), *turns, most=128)
    assert "Rules. " * 9 in cut and cut.endswith("question<|end|>\n<|start|>assistant\n") and "short" not in cut
    assert "\ufffd" not in chat_of(("user", "日本語" * 20), most=50)


def test_what_cannot_be_cut_is_left_out(capsys):
    config = DataConfig(train_file="x", max_prompt_tokens=40, overlong="cut", system_prompt="")
    prompter = build_prompter(byte_tokenizer(), config)
    talk = [{"role": "user", "content": "?"}] * 20
    given = [Example(messages, "d", None, "t") for messages in (talk, [{"role": "user", "content": "x" * 60}])]
    assert len(fit(prompter, given, config, True)) == 1
    assert "1 of 2 examples are cut, 1 of 2 examples are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"all 1 examples are too long and cannot be cut to that, so nothing is left"):
        fit(prompter, given[:1], config, True)


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


def test_what_the_template_does_not_take_is_refused_or_left_out(capsys):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    bad = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    examples = [Example(messages, "d", None, "t", source="t:1") for messages in (bad, bad[:1])]
    config = DataConfig(train_file="x", broken="drop")
    prompter = build_prompter(byte_tokenizer(), config)
    assert len(fit(prompter, examples, config, True)) == 1
    assert capsys.readouterr().err.startswith(
        "warning: data.broken: 1 of 2 examples are left out, the first: t:1: tool"
    )
    with pytest.raises(UserError, match=r"t:1: tool_calls: .*nothing is left of 1 examples"):
        fit(prompter, examples[:1], config, True)
    with pytest.raises(UserError, match=r"t:1: tool_calls"):
        fit(prompter, examples, DataConfig(train_file="x"), True)
