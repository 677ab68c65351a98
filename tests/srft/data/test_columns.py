"""Which columns are the prompt, the demonstration, the answer: published formats, and what is refused."""

from pathlib import Path

import pytest

from srft.config import DataConfig
from srft.data.files import read_examples
from srft.errors import UserError

from .test_files import write

INPUTS = Path(__file__).parents[2] / "data"
QUESTION = "Mia has 3 pears and picks 4 more. How many now?"
SOLUTION = "3 + 4 = <<3+4=7>>7 pears.\n#### 7"
USER = {"role": "user", "content": QUESTION}
BRIEF = {"role": "system", "content": "Be brief."}


def read(name, **settings):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    return [row[-1] for row in read_examples(str(INPUTS / name), DataConfig(**settings))]


def rows(tmp_path, *lines, **settings):
    return [row[-1] for row in read_examples(write(tmp_path / "rows.jsonl", lines), DataConfig(**settings))]


@pytest.mark.parametrize(
    ("name", "messages", "demonstration", "answer"),
    [
        ("gsm8k.jsonl", [USER], SOLUTION, "7"),
        ("gsm8k_renamed.jsonl", [USER], SOLUTION, "7"),
        ("list.json", [USER], SOLUTION, "7"),
        ("table.csv", [USER], SOLUTION, "7"),
        ("alpaca.jsonl", [{"role": "user", "content": "Add the numbers.\n3, 4"}], SOLUTION, None),
        ("sharegpt.jsonl", [BRIEF, USER], SOLUTION, None),
        ("openai.jsonl", [BRIEF, USER], SOLUTION, None),
        ("openai_parts.jsonl", [{"role": "user", "content": f"Add. {QUESTION}"}], SOLUTION, None),
        ("trl.jsonl", [USER], SOLUTION, None),
        ("trl_chats.jsonl", [USER], SOLUTION, None),
        ("openr1.jsonl", [USER], "<think>\n3 + 4\n</think>\n\n\\boxed{7}", "7"),
        ("deepmath.jsonl", [USER], SOLUTION, "7"),
        ("verl.parquet", [USER], SOLUTION, "7"),
        ("luffy.parquet", [USER], SOLUTION, "7"),
    ],
)
def test_published_formats(name, messages, demonstration, answer):
    first = read(name)[0]
    assert (first.messages, first.demonstration, first.answer) == (messages, demonstration, answer)


def test_every_turn_of_a_chat_or_its_last():
    chats = read_examples(str(INPUTS / "openai_turns.jsonl"), DataConfig(turns="all"))
    assert [each.demonstration for each in chats[0]] == ["Hello!", SOLUTION, "#### 14"]
    assert [[len(each.messages) for each in row] for row in chats] == [[1, 3, 5]] * 3
    assert [each.answer for each in chats[0]] == [None, None, "14"]  # the answer is to the last question
    last = read("openai_turns.jsonl")
    assert last == [row[-1] for row in chats]


def test_turns_that_are_not_to_be_learned_from(tmp_path):
    chat = [{"role": "assistant", "content": "Welcome."}, USER, {"role": "assistant", "content": "no", "weight": 0}]
    chat += [USER, {"role": "assistant", "content": "yes"}, USER, {"role": "assistant", "content": "no", "weight": 0}]
    file = write(tmp_path / "chats.jsonl", [{"messages": chat}])
    (row,) = read_examples(file, DataConfig(turns="all"))
    assert [each.demonstration for each in row] == ["yes", None]  # the greeting answers nothing


def test_turns_of_a_prompt_are_not_learned_from(tmp_path):
    prompt = [USER, {"role": "assistant", "content": "a"}, USER]
    completion = [{"role": "assistant", "content": "b"}, USER, {"role": "assistant", "content": "c"}]
    file = write(tmp_path / "chats.jsonl", [{"prompt": prompt, "completion": completion}])
    (row,) = read_examples(file, DataConfig(turns="all"))
    assert [each.demonstration for each in row] == ["b", "c"]


def test_tool_calls_and_tools_are_kept():
    called, answered, texts = read("openai_tools.jsonl")
    assert called.turn["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 3, "b": 4}}
    assert called.tools[0]["function"]["name"] == "add" and '"a": 3' in called.demonstration
    assert answered.messages[1]["tool_calls"] and answered.messages[2]["tool_call_id"] == "c1"
    assert answered.messages[2]["name"] == "add" and answered.demonstration == "#### 13" and answered.turn is None
    assert texts.tools[0]["function"]["parameters"]["properties"]  # a text with a flat list


def test_columns_that_are_named():
    openr1 = read("openr1.jsonl", columns={"demonstration": "solution"})
    assert openr1[0].demonstration == SOLUTION
    trl = read("trl.jsonl", columns={"answer": "completion"})
    assert (trl[0].demonstration, trl[0].answer) == (SOLUTION, "7")
    verl = read("verl.parquet", columns={"prompt": "extra_info.question", "demonstration": ""})
    assert (verl[0].prompt, verl[0].demonstration) == (QUESTION, None)
    assert all(each.answer is None for each in read("gsm8k.jsonl", columns={"answer": ""}))
    for turns in ("last", "all"):
        chats = read("openai_turns.jsonl", columns={"demonstration": ""}, turns=turns)
        assert [(len(each.messages), each.demonstration) for each in chats] == [(5, None)] * 3


def test_a_solution_without_a_mark_is_no_answer(tmp_path):
    (one,) = rows(tmp_path, {"prompt": "p", "answer": "long story"}, columns={"demonstration": "answer"})
    assert (one.demonstration, one.answer) == ("long story", None)
    (one,) = rows(tmp_path, {"prompt": "p", "answer": "5"})
    assert (one.demonstration, one.answer) == (None, "5")


def test_reward_functions_get_the_columns_by_their_own_names():
    assert read("verl.parquet")[0].columns["reward_model"] == {"style": "rule", "ground_truth": "7"}
    assert read("openr1.jsonl")[0].columns.keys() == {
        "problem",
        "solution",
        "generations",
        "correctness_math_verify",
    }


def test_our_own_names_come_first(tmp_path):
    row = {"prompt": "p", "question": "q", "demonstration": "d", "solution": "s", "answer": 1, "ground_truth": 2}
    (one,) = rows(tmp_path, row)
    assert (one.prompt, one.demonstration, one.answer) == ("p", "d", "1")
    chat = [{"role": "user", "content": "m"}, {"role": "assistant", "content": "a"}]
    (one,) = rows(tmp_path, {"messages": chat, "problem": "q", "solution": "s", "response": "r"})
    assert (one.prompt, one.demonstration) == ("m", "a")
    (one,) = rows(tmp_path, {"messages": chat, "problem": "q", "solution": "s"}, columns={"prompt": "problem"})
    assert (one.prompt, one.demonstration) == ("q", "s")


def test_generations_that_are_all_wrong_give_way_to_the_solution(tmp_path):
    row = {"problem": "p", "solution": "s", "generations": ["a", "b"], "correctness_math_verify": [False, False]}
    assert rows(tmp_path, row)[0].demonstration == "s"
    assert rows(tmp_path, {**row, "correctness_math_verify": None})[0].demonstration == "a"


def test_an_empty_answer_is_none(tmp_path):
    found = rows(tmp_path, *({"prompt": str(i), "answer": each} for i, each in enumerate(["", " \n", None, "0", 0])))
    assert [each.answer for each in found] == [None, None, None, "0", "0"]


def test_instructions_and_what_they_are_done_to(tmp_path):
    dolly = {"instruction": "Sum up.", "context": "A long story.", "response": "Short.", "category": "summarization"}
    bare = {"input": "2 + 2?", "output": "4"}
    first, second = rows(tmp_path, dolly, bare)
    assert (first.prompt, first.demonstration) == ("Sum up.\nA long story.", "Short.")
    assert (second.prompt, second.demonstration) == ("2 + 2?", "4")


def test_a_part_of_a_question_may_be_meant(tmp_path):
    (one,) = rows(tmp_path, {"question": "a", "choices": ["b"], "answer": 1}, columns={"prompt": "question"})
    assert one.prompt == "a" and one.columns["choices"] == ["b"]


def test_systems_of_their_own_column(tmp_path):
    (one,) = rows(tmp_path, {"system_prompt": "Be brief.", "question": "q", "response": "r"})
    assert one.messages == [BRIEF, {"role": "user", "content": "q"}] and one.demonstration == "r"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "a", "problem": "b"},
            "the columns 'question' and 'problem' could both be the prompt; say which: "
            'data.columns = {prompt = "question"}',
        ),
        (
            {"prompt": "a", "solution": "b", "response": "c"},
            "the columns 'solution' and 'response' could both be the demonstration; say which: ",
        ),
        ({"prompt": "a", "task": "t"}, "the column 'task' has a name that reward functions know for something else; "),
        ({"prompt": "a", "prompts": "t"}, "the column 'prompts' has a name that reward functions know"),
        ({"prompt": "a", "completions": "t"}, "the column 'completions' has a name that reward functions know"),
        (
            {"question": "a", "choices": "b or c", "answer": 1},
            "the column 'choices' would not be seen, the prompt is 'question' alone; write the whole prompt into one",
        ),
        (
            {"messages": [USER], "images": ["x.png"]},
            "the column 'images' would not be seen, the prompt is 'messages' alone; text is all that is trained on, or "
            'say that it is the prompt: data.columns = {messages = "messages"}',
        ),
        ({"text": "a"}, "the column 'prompt' or 'messages' is missing; found columns: text"),
        (
            {"prompt": "a", "answer": "\ud83d"},
            "answer: a lone surrogate, '\\ud83d', is half of a character and no text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}], "completion": "b"},
            "messages end in an assistant turn and there is a completion too; keep one of them",
        ),
        (
            {"messages": [BRIEF, USER], "system": "s"},
            "the chat has a system turn and there is a column 'system' too; leave that out",
        ),
        ({"prompt": "a", "tools": [5]}, 'tools: a tool is {"function": {"name": text, …}}, found 5'),
    ],
)
def test_rows_that_could_be_two_things_or_none(tmp_path, row, expected):
    with pytest.raises(UserError) as error:
        rows(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: {expected}")


def test_a_reserved_column_may_be_left_out(tmp_path):
    (one,) = rows(tmp_path, {"prompt": "a", "task": "t", "x": 1}, columns={"task": ""})
    assert one.task == "rows" and one.columns == {"x": 1}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"demonstraton": "solution"}, "data.columns.demonstraton: not a part of an example; did you mean 'demonstrat"),
        ({"demonstration": 5}, "data.columns.demonstration: expected the name of a column, found 5"),
        (
            {"demonstration": "solutoin"},
            "data.columns.demonstration: no row has a column 'solutoin'; did you mean 'sol",
        ),
        ({"prompt": "probem"}, "openr1.jsonl:1: the column 'probem' is missing; did you mean 'problem'?; found"),
    ],
)
def test_names_that_are_mistaken(columns, expected):
    with pytest.raises(UserError) as error:
        read("openr1.jsonl", columns=columns)
    assert expected in str(error.value)


def test_roles_in_any_case_and_roles_that_nobody_has(tmp_path):
    turns = [{"from": "Human", "value": "Q?"}, {"from": "GPT", "value": "A"}]
    (one,) = rows(tmp_path, {"conversations": turns, "answer": "A"})
    assert (one.messages, one.demonstration) == ([{"role": "user", "content": "Q?"}], "A")
    with pytest.raises(UserError, match=r":1: messages: expected a turn of system, .* found the role 'critic'"):
        rows(tmp_path, {"messages": [{"role": "critic", "content": "x"}, USER]})


@pytest.mark.parametrize("text", [str, lambda turns: __import__("json").dumps(turns, indent=1)])
def test_chats_in_cells(tmp_path, text):
    told = [{"role": "assistant", "content": "7"}]
    (one,) = rows(tmp_path, {"prompt": text([USER]), "completion": text(told)})
    assert (one.messages, one.demonstration) == ([USER], "7")
    (one,) = rows(tmp_path, {"prompt": text(USER), "completion": text(told[0])})
    assert (one.messages, one.demonstration) == ([USER], "7")
    (one,) = rows(tmp_path, {"prompt": text([USER, *told])})
    assert one.demonstration == "7"
    with pytest.raises(UserError, match=r"rows.jsonl:1: prompt: expected a chat as JSON, found .* cannot be read"):
        rows(tmp_path, {"prompt": text([USER])[:-3]})


def test_columns_in_capitals(tmp_path):
    (one,) = rows(tmp_path, {"Instruction": "Add.", "Input": "3, 4", "Output": "7"})
    assert (one.prompt, one.demonstration) == ("Add.\n3, 4", "7")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "Q", "input": "X", "answer": 3},
            "the column 'input' would not be seen, the prompt is",
        ),
        ({"Body": "A story.", "Question": "How much?", "Answer": 3}, "the column 'Body' would not be seen"),
        ({"messages": [USER, {"role": "assistant", "content": "no"}], "label": False}, "the column 'label' says which"),
        ({"question": 3, "answer": 1}, "question: expected text or a chat, found 3"),
        ({"chosen": "a", "rejected": "b"}, "of preference data only the chosen can be imitated"),
        (
            {"messages": [USER, *[{"role": "assistant", "content": "a"}] * 2]},
            "messages have two assistant turns at their end, one after the other",
        ),
    ],
)
def test_what_would_be_lost_or_mistaken_is_refused(tmp_path, row, expected):
    with pytest.raises(UserError) as error:
        rows(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: ") and expected in str(error.value)


def test_older_functions_and_systems_that_are_turns(tmp_path):
    chat = [{"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}]
    row = {"messages": [USER, *chat], "functions": [{"name": "add"}], "system": [BRIEF]}
    (one,) = rows(tmp_path, row)
    assert one.tools == [{"type": "function", "function": {"name": "add"}}] and one.messages == [BRIEF, USER]


def test_a_chat_beside_rated_generations_is_not_taken_for_right(tmp_path):
    chat = [USER, {"role": "assistant", "content": "wrong"}]
    row = {"problem": QUESTION, "solution": "s", "generations": ["wrong", "right"], "messages": chat}
    assert rows(tmp_path, row | {"correctness_math_verify": [False, True]})[0].demonstration == "right"
    assert rows(tmp_path, row)[0].demonstration == "wrong"


def test_what_axolotl_does_not_train_on(tmp_path):
    chat = [USER, {"role": "assistant", "content": "a", "train": False}, USER, {"role": "assistant", "content": "b"}]
    (row,) = read_examples(write(tmp_path / "chats.jsonl", [{"messages": chat}]), DataConfig(turns="all"))
    assert [each.demonstration for each in row] == ["b"]


def test_an_empty_demonstration_is_none(tmp_path):
    found = rows(tmp_path, {"prompt": "a", "completion": " "}, {"prompt": "b", "demonstration": "", "answer": 3})
    assert [(each.demonstration, each.answer) for each in found] == [(None, None), (None, "3")]
