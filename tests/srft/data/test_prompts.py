"""Prompts and demonstrations as tokens."""

import pytest

from srft.config import DataConfig
from srft.data import Example
from srft.data.prompts import build_prompter, end_of_turn
from srft.errors import UserError
from tests.srft.conftest import TEMPLATE, byte_tokenizer

FILE = DataConfig(train_file="train.jsonl")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


def example(*turns, demonstration=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return Example(messages, demonstration, None, "train", source="train.jsonl:3")


def text(prompter, one):
    return prompter.tokenizer.decode(prompter.encode_prompt(one))


def test_chat_template():
    prompter = build_prompter(byte_tokenizer(), FILE)
    assert text(prompter, example("hi")) == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


def test_system_prompt():
    tasks = build_prompter(byte_tokenizer(), DataConfig())
    assert "####" in text(tasks, example("hi"))  # tasks say how to answer, files only what they are told to
    own = build_prompter(byte_tokenizer(), DataConfig(train_file="train.jsonl", system_prompt="Be brief."))
    assert text(own, example("hi")).startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nhi")
    given = Example([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], None, None, "train")
    assert "Be brief." not in text(own, given)
    silent = build_prompter(byte_tokenizer(), DataConfig(system_prompt=""))
    assert text(silent, example("hi")).startswith("<|start|>user")


def test_a_template_without_system_role_gets_it_in_the_first_turn():
    prompter = build_prompter(byte_tokenizer(NO_SYSTEM), DataConfig(system_prompt="Be brief."))
    assert text(prompter, example("hi")).startswith("<|start|>user\nBe brief.\n\nhi<|end|>")


def test_plain_text_without_template():
    prompter = build_prompter(byte_tokenizer(None), DataConfig(system_prompt="Be brief."))
    assert text(prompter, example("hi")) == "Be brief.\n\nhi\n"
    assert prompter.encode_demonstration(example("hi", demonstration="a"))[-1] == 0


def test_prompt_and_demonstration_make_the_whole_chat():
    tokenizer = byte_tokenizer()
    prompter = build_prompter(tokenizer, FILE)
    one = example("hi", demonstration="Grüße, 1 + 1")
    chat = [*one.messages, {"role": "assistant", "content": one.demonstration}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    ids = prompter.encode_prompt(one) + prompter.encode_demonstration(one)
    assert ids == whole[: len(ids)]
    assert prompter.decode(prompter.encode_demonstration(one)) == one.demonstration


def test_end_of_turn_comes_from_the_template():
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>", "<|start|>"))
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|start|>") != tokenizer.eos_token_id


def test_a_tokenizer_without_any_end():
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token: set eos_token"):
        build_prompter(tokenizer, FILE)


def test_a_template_that_refuses_a_chat_is_named():
    picky = "{% if messages[0].content == 'bad' %}{{ raise_exception('not that') }}{% endif %}" + TEMPLATE
    with pytest.raises(UserError, match=r"train.jsonl:3: the chat template of the tokenizer refuses it: not that"):
        build_prompter(byte_tokenizer(picky), FILE).encode_prompt(example("bad"))


def test_the_embedded_tokenizer(embedded):
    prompter = build_prompter(embedded.tokenizer, DataConfig())
    one = example("1 + 2 =", demonstration="1 + 2 = 3\n#### 3")
    assert text(prompter, one).endswith("<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n")
    ids = prompter.encode_demonstration(one)
    assert embedded.tokenizer.decode(ids) == "1 + 2 = 3\n#### 3<|im_end|>"
    assert ids[-1] in embedded.eos_ids and prompter.decode(ids) == one.demonstration
