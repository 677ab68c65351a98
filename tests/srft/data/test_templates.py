"""Chats as chat templates write them: thoughts that a template opens, tools and calls, arguments of the template."""

import pytest

from srft.config import DataConfig
from srft.data import Example
from srft.data.prompts import build_prompter
from srft.errors import UserError
from tests.srft.conftest import TEMPLATE, byte_tokenizer

from .test_columns import read

HEAD = "{% for turn in messages %}<|start|>{{ turn.role }}\n"
FOOT = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
# As DeepSeek-R1's distills: the answer begins in a thought, and the thoughts of turns that are given are left out.
OPENS = HEAD + "{{ turn.content.split('</think>')[-1] }}" + FOOT + "<think>\n{% endif %}"
# As Qwen3-Thinking: the same, and the last turn's thought is written, an empty one where it has none.
THINKS = (
    HEAD + "{% if turn.role == 'assistant' %}{% set parts = turn.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].strip('\n') }}"
    "{% else %}{{ turn.content }}{% endif %}" + FOOT + "<think>\n{% endif %}"
)
# As Qwen3: thinks unless it is told not to.
CLOSED = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
SWITCH = HEAD + "{{ turn.content }}" + FOOT + CLOSED + "{% endif %}"
TOOLS = (
    "{% if tools %}<|start|>system\n{{ tools|tojson }}<|end|>\n{% endif %}" + HEAD + "{{ turn.content or '' }}"
    "{% for call in turn.tool_calls %}<call>{{ call.function|tojson }}</call>{% endfor %}" + FOOT + "{% endif %}"
)
# As DeepSeek-V3: arguments of a call are text.
TEXTS = (
    HEAD + "{{ turn.content }}{% for call in turn.tool_calls %}"
    "{{ call.function.name + ': ' + call.function.arguments }}{% endfor %}" + FOOT + "{% endif %}"
)
QUESTION = [{"role": "user", "content": "3 + 4?"}]
THOUGHT = "<think>\n3 plus 4.\n</think>\n\nIt is 7."
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}


def written(chat_template, demonstration, **settings):
    """The text of the prompt after its head, and of the demonstration."""
    prompter = build_prompter(byte_tokenizer(chat_template), DataConfig(train_file="train.jsonl", **settings))
    given = demonstration if isinstance(demonstration, Example) else Example(QUESTION, demonstration, None, "t")
    problem = prompter.problem(given)
    prompt, answer = (prompter.tokenizer.decode(ids) for ids in (problem.prompt, problem.demonstration))
    return prompt.rpartition("assistant\n")[2], answer


def example(turn, messages=QUESTION, tools=None):
    return Example(list(messages), "text", None, "t", source="t.jsonl:1", tools=tools, turn=turn)


@pytest.mark.parametrize("template", [OPENS, THINKS], ids=["R1", "Qwen3-Thinking"])
@pytest.mark.parametrize(
    ("demonstration", "expected"),
    [
        (THOUGHT, "3 plus 4.\n</think>\n\nIt is 7.<|end|>"),
        (THOUGHT.removeprefix("<think>\n"), "3 plus 4.\n</think>\n\nIt is 7.<|end|>"),
        ("It is 7.", "\n</think>\n\nIt is 7.<|end|>"),
    ],
    ids=["a thought", "a thought without its opening", "no thought"],
)
def test_a_thought_that_the_prompt_opens_is_not_opened_again(template, demonstration, expected):
    assert written(template, demonstration) == ("<think>\n", expected)


def test_an_open_thought_in_the_published_file_of_thoughts():
    tokenizer = byte_tokenizer(OPENS)
    prompter = build_prompter(tokenizer, DataConfig(train_file="x"))
    for each in map(prompter.problem, read("thoughts.jsonl")):
        text = tokenizer.decode(each.prompt + each.demonstration)
        assert text.count("<think>") == text.count("</think>") == 1 and "<think>\n<think>" not in text


def test_arguments_of_the_template():
    assert written(SWITCH, "It is 7.") == ("", "It is 7.<|end|>")
    assert written(SWITCH, THOUGHT) == ("", THOUGHT + "<|end|>")
    quiet = {"template_args": {"enable_thinking": False}}
    assert written(SWITCH, "It is 7.", **quiet) == ("<think>\n\n</think>\n\n", "It is 7.<|end|>")
    assert written(SWITCH, "<think>\n\n</think>\n\nIt is 7.", **quiet)[1] == "It is 7.<|end|>"
    with pytest.raises(UserError, match=r"^t: the demonstration begins with <think>, but the chat template has closed"):
        written(SWITCH, THOUGHT, **quiet)


@pytest.mark.parametrize(
    ("settings", "template", "expected"),
    [
        (
            {"template_args": {"enable_thinkin": False}},
            SWITCH,
            "data.template_args.enable_thinkin: the tokenizer's chat template has no argument 'enable_thinkin'; "
            "did you mean 'enable_thinking'?",
        ),
        (
            {"template_args": {"tools": []}},
            TOOLS,
            "data.template_args.tools: srft gives the chat template this argument itself",
        ),
        (
            {"template_args": {"enable_thinking": False}, "template": "none"},
            SWITCH,
            "data.template_args: enable_thinking cannot be used: data.template is none",
        ),
        (
            {"template_args": {"enable_thinking": False}},
            None,
            "data.template_args: enable_thinking cannot be used: the tokenizer has no chat template",
        ),
    ],
)
def test_arguments_that_no_template_takes(settings, template, expected):
    with pytest.raises(UserError) as error:
        written(template, "7", **settings)
    assert str(error.value) == expected


def test_plain_text_where_there_is_a_template():
    prompter = build_prompter(byte_tokenizer(TEMPLATE), DataConfig(train_file="x", template="none"))
    problem = prompter.problem(Example(QUESTION, "7", None, "t"))
    assert prompter.tokenizer.decode(problem.prompt + problem.demonstration) == "3 + 4?\n7<|end|>"
    with pytest.raises(UserError, match=r"t.jsonl:1: tool_calls: plain text has no form for them"):
        prompter.problem(example({"role": "assistant", "content": None, "tool_calls": [CALL]}))


def test_a_demonstration_that_calls_a_tool_is_learned_with_its_call():
    called, answered, _ = read("openai_tools.jsonl")
    prompter = build_prompter(byte_tokenizer(TOOLS), DataConfig(train_file="x"))
    problem = prompter.problem(called)
    expected = '<call>{"name": "add", "arguments": {"a": 3, "b": 4}}</call>'
    assert prompter.tokenizer.decode(problem.demonstration) == expected + "<|end|>"
    assert problem.example.demonstration == expected  # what the reward sees is what a rollout would be
    assert '"description": "Adds."' in prompter.tokenizer.decode(problem.prompt)
    history = prompter.tokenizer.decode(prompter.encode_prompt(answered))
    assert '<call>{"name": "add", "arguments": {"a": 8, "b": 5}}</call><|end|>\n<|start|>tool\n13<|end|>' in history


def test_a_call_after_a_thought_that_the_prompt_opens():
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    opens = TOOLS.replace(FOOT, FOOT + "<think>\n")
    call = '<call>{"name": "add", "arguments": {"a": 3, "b": 4}}</call><|end|>'
    assert written(opens, example(turn)) == ("<think>\n", "\n</think>\n\n" + call)


def test_templates_that_want_arguments_as_text():
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert written(TEXTS, example(turn))[1] == 'add: {"a": 3, "b": 4}<|end|>'


def test_content_that_is_null_is_not_printed():
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    printing = TOOLS.replace("turn.content or ''", "turn.content")
    assert written(printing, example(turn))[1] == written(TOOLS, example(turn))[1]


def test_reasoning_in_a_field_of_its_own():
    turn = {"role": "assistant", "content": "It is 7.", "reasoning_content": "3 plus 4."}
    thinking = Example(QUESTION, THOUGHT, None, "t", turn=turn)
    assert written(TEMPLATE, thinking)[1] == THOUGHT + "<|end|>"  # a template that does not know the field
    knows = TEMPLATE.replace("{{ turn.content }}", "{{ turn.reasoning_content }} So: {{ turn.content }}")
    assert written(knows, thinking)[1] == "3 plus 4. So: It is 7.<|end|>"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            example(None, tools=[{"type": "function", "function": {"name": "add"}}]),
            "tools: the chat template of the tokenizer does not show them; take a model that knows tools, or leave",
        ),
        (
            example(None, [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, *QUESTION]),
            "tool_calls: the chat template of the tokenizer does not show them",
        ),
        (
            example({"role": "assistant", "content": "x", "tool_calls": [CALL]}),
            "tool_calls of the demonstration: the chat template of the tokenizer does not show them",
        ),
    ],
)
def test_what_a_template_does_not_show_is_refused(given, expected):
    with pytest.raises(UserError) as error:
        written(TEMPLATE, given)
    assert str(error.value).startswith(f"t.jsonl:1: {expected}")
