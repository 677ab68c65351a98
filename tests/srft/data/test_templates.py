"""Chats as chat templates write them: thoughts that a template opens, tools and calls, arguments of the template."""

import dataclasses

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


# As Qwen3's and others: roles that it does not know are passed over.
SOME = HEAD.replace("%}<|start|>", "%}{% if turn.role in ('system', 'user', 'assistant') %}<|start|>") + (
    "{{ turn.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As those of models that see images.
PARTS = (
    "{% for turn in messages %}<|start|>{{ turn.role }}\n{% for part in turn.content %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def prompt_of(chat_template, messages, **settings):
    prompter = build_prompter(byte_tokenizer(chat_template), DataConfig(train_file="train.jsonl"))
    return prompter.tokenizer.decode(prompter.encode_prompt(Example(messages, None, None, "t", source="t.jsonl:1")))


def test_a_turn_that_the_template_passes_over_is_refused_or_written_as_the_system():
    developer = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    assert prompt_of(SOME, developer).startswith("<|start|>system\nBe brief.<|end|>")
    with pytest.raises(UserError, match=r"t.jsonl:1: turn 1, of the role 'tool': the chat template .* not show it"):
        prompt_of(SOME, [{"role": "tool", "content": "a long result of a tool, of which nothing is seen"}, *QUESTION])
    prompter = build_prompter(byte_tokenizer(SOME), DataConfig(train_file="train.jsonl"))
    problem = prompter.problem(Example(developer, "7", None, "t"))
    assert prompter.tokenizer.decode(problem.demonstration) == "7<|end|>"


def test_a_template_that_wants_parts_gets_them():
    assert prompt_of(PARTS, QUESTION) == "<|start|>user\n3 + 4?<|end|>\n<|start|>assistant\n"
    assert written(PARTS, "It is 7.") == ("", "It is 7.<|end|>")


def test_a_second_call_that_is_lost_is_refused():
    first = TOOLS.replace("turn.tool_calls", "(turn.tool_calls or [])[:1]")
    two = {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL, {**CALL, "function": CALL["function"] | {"name": "add"}}],
    }
    two["tool_calls"][1] = {"type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": 6}}}
    tools = [{"type": "function", "function": {"name": "add"}}]  # which names what is called
    with pytest.raises(UserError, match=r"tool_calls of the demonstration: the chat template .* does not show them"):
        written(first, example(two, tools=tools))
    with pytest.raises(UserError, match=r"t.jsonl:1: tool_calls: the chat template .* does not show them"):
        written(first, example(None, [*QUESTION, two, *QUESTION], tools))
    assert written(TOOLS, example(two, tools=tools))[1].count("<call>") == 2


def test_a_call_that_ends_the_turn_itself_gets_no_other_end():
    """As gpt-oss's and Gemma 4's."""
    ends = TOOLS.replace("</call>{% endfor %}", "</call>{% endfor %}{% if turn.tool_calls %}<|start|>{% else %}") + ""
    ends = ends.replace("<|end|>\n{% endfor %}{% if add", "<|end|>\n{% endif %}{% endfor %}{% if add")
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = written(ends, example(call))[1]
    assert answer.endswith("</call><|start|>") and "<|end|>" not in answer
    assert written(ends, "It is 7.")[1] == "It is 7.<|end|>"


def sentencepiece():
    """A tokenizer that marks the beginnings of words, as Llama 2's: that of a text too."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("▁<|end|>startuserassistantIt is 7.3+4?\n"))
    words = ["<unk>", "<|end|>", "<|start|>", *letters, "It", "▁It"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[("I", "t"), ("▁", "It")], unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.mark.parametrize("template", ["auto", "none"])
def test_a_demonstration_begins_as_a_rollout_does_and_not_as_a_text(template):
    tokenizer = sentencepiece()
    prompter = build_prompter(tokenizer, DataConfig(train_file="x", template=template))
    assert tokenizer.tokenize("It")[0] == "▁It"
    problem = prompter.problem(Example(QUESTION, "It is 7.", None, "t"))
    assert tokenizer.convert_ids_to_tokens(problem.demonstration)[:2] == ["It", "▁"]
    assert tokenizer.convert_ids_to_tokens(problem.prompt)[-1] == "\n"


def test_plain_text_is_joined_by_a_new_line_where_nothing_else_parts_it():
    prompter = build_prompter(byte_tokenizer(None), DataConfig(train_file="x"))
    for prompt, demonstration in (("3 + 4?", " 7"), ("Q: ", "7"), ("3 + 4?", "7")):
        problem = prompter.problem(Example([{"role": "user", "content": prompt}], demonstration, None, "t"))
        whole = prompter.tokenizer.decode(problem.prompt + problem.demonstration)
        assert whole == prompt + "\n" * (prompt == "3 + 4?") + demonstration + "<|end|>"
        assert problem.prompt == prompter.encode_prompt(dataclasses.replace(problem.example, demonstration=None))
    with pytest.raises(UserError, match="the prompt is empty"):
        prompter.problem(Example([{"role": "user", "content": ""}], "7", None, "t"))


def test_a_long_chat_is_not_written_once_for_each_turn(monkeypatch):
    prompter = build_prompter(byte_tokenizer(TEMPLATE), DataConfig(train_file="x"))
    turns = [{"role": role, "content": str(i)} for i in range(50) for role in ("user", "assistant")][:-1]
    written = []
    original = type(prompter.template).write
    monkeypatch.setattr("srft.data.templates.Template.write", lambda *a, **k: (written.append(1), original(*a, **k))[1])
    prompter.encode_prompt(Example(turns, "7", None, "t"))
    assert len(written) < 8
    prompter.encode_prompt(Example(turns[:-2], "7", None, "t"))
    assert len(written) < 10
