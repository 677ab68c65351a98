"""Turns of every form become the one that chat templates take; others are refused by name."""

import csv
import json

import pytest

from srft.config import DataConfig
from srft.data.chats import text_of, to_chat, to_tools
from srft.data.files import read_examples
from srft.errors import UserError

WHERE = "a.jsonl:1: messages"
FUNCTION = {"name": "add", "arguments": {"a": 1}}


def turn(value, **options):
    (made,) = to_chat([value], WHERE, **options)
    return made


@pytest.mark.parametrize(
    "value",
    [
        {"role": "assistant", "tool_calls": [{"function": FUNCTION}]},
        {"role": "assistant", "content": None, "tool_calls": [FUNCTION]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ],
)
def test_calls_of_every_form(value):
    expected = [{"type": "function", "function": FUNCTION}]
    assert turn(value) == {"role": "assistant", "content": None, "tool_calls": expected}


def test_keys_that_templates_know_are_kept():
    made = turn({"role": "assistant", "content": "5", "reasoning_content": "2 + 3", "name": "Ada"})
    assert made == {"role": "assistant", "content": "5", "reasoning_content": "2 + 3", "name": "Ada"}
    assert text_of(made) == "<think>\n2 + 3\n</think>\n\n5"


def test_names_of_roles():
    froms = ["system", "human", "gpt", "observation"]
    chat = to_chat([{"from": each, "value": "x"} for each in froms], WHERE)
    assert [each["role"] for each in chat] == ["system", "user", "assistant", "tool"]


def test_nulls_of_a_table_are_what_is_not_there():
    value = {"role": "user", "content": "x", "tool_calls": None, "name": None}
    assert turn(value) == {"role": "user", "content": "x"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
    assert turn(call)["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert turn(call, padded=True)["tool_calls"][0]["function"]["arguments"] == {}


def test_chats_in_a_cell_of_a_table():
    assert to_chat('[{"role": "user", "content": "x"}]', WHERE) == [{"role": "user", "content": "x"}]
    assert to_chat('[{"a": 1}]', WHERE) == [{"role": "user", "content": '[{"a": 1}]'}]


def test_a_chat_in_a_cell_tells_its_own_demonstration(tmp_path):
    chat = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "solution"], [chat, "s"]])
    ((one,),) = read_examples(str(tmp_path / "a.csv"), DataConfig())
    assert (one.prompt, one.demonstration) == ("q", "a")


def test_no_tools_are_none():
    assert [to_tools(each, WHERE) for each in (None, [], "", "[]")] == [None] * 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"role": "user", "content": None}, 'a turn is {"role": text, "content": text}, found'),
        ({"role": "assistant"}, 'a turn is {"role": text, "content": text}, found'),
        ({"role": 5, "content": "x"}, 'a turn is {"role": text, "content": text}, found'),
        ("x", 'a turn is {"role": text, "content": text}, found'),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "a part of the content is of type 'image_url'; srft trains on text alone",
        ),
        ({"role": "assistant", "tool_calls": [{"function": "add"}]}, 'a tool call is {"function": {"name": text, '),
        ({"from": "function_call", "value": "add"}, 'a tool call is {"function": {"name": text, '),
    ],
)
def test_turns_that_are_refused(value, expected):
    with pytest.raises(UserError) as error:
        turn(value)
    assert str(error.value).startswith(f"{WHERE}: {expected}")
