"""Benchmark files as they are published, by made rows in each format, and multiple-choice questions."""

import csv
import io
import json
from pathlib import Path

import pytest

from srft.config import DataConfig
from srft.data.choices import ASK
from srft.data.examples import prompt_hash
from srft.data.files import read_examples
from srft.errors import UserError

MADE = Path(__file__).parents[2] / "data" / "benchmarks"


def read(path, **settings):
    return [row[-1] for row in read_examples(str(path), DataConfig(**settings))]


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("aime24.jsonl", ["012", "043"]),
        ("aime24_by_year.jsonl", ["210", "56"]),
        ("aime25.jsonl", ["28", "84"]),
        ("amc23.jsonl", ["81.0", "27.0"]),
        ("amc_validation.jsonl", ["142.0", "27.0"]),
        ("math500.jsonl", ["\\left( 3, \\frac{\\pi}{2} \\right)", "\\frac{3}{4}"]),
        ("minerva.jsonl", ["1", "5e23", "\\{-2, 2\\}"]),
        ("olympiadbench.jsonl", ["3,-3", "50", "0, 1"]),
    ],
)
def test_sets_with_answers(file, answers):
    examples = read(MADE / file)
    assert [each.answer for each in examples] == answers
    rows = [json.loads(line) for line in (MADE / file).read_text().splitlines()]
    questions = [row.get("problem") or row.get("question") or row["Problem"] for row in rows]
    assert [each.prompt for each in examples] == questions and all(each.choices is None for each in examples)


@pytest.mark.parametrize(
    ("file", "right"),
    [
        ("arc_c.jsonl", ["the Sun", "carbon dioxide", "all of the above"]),
        ("gpqa_d.csv", ["mercury", "2"]),
        ("mmlu_pro.jsonl", ["$3x^2$", "the supreme court"]),
    ],
)
def test_sets_with_choices(file, right):
    for seed in range(5):
        for example, text in zip(read(MADE / file, choice_seed=seed), right, strict=True):
            assert example.choices["ABCDEFGHIJ".index(example.answer)] == text
            assert f"\n{example.answer}. {text}\n" in example.prompt and example.prompt.endswith(f"\n\n{ASK}")
            shown = example.prompt.split("\n\n")[-2].splitlines()
            assert shown == [f"{letter}. {each}" for letter, each in zip("ABCDEFGHIJ", example.choices)]


def test_options_are_in_an_order_of_the_seed_and_the_question():
    orders = [tuple(each.choices for each in read(MADE / "mmlu_pro.jsonl", choice_seed=seed)) for seed in range(4)]
    assert len(set(map(str, orders))) == 4 and all(sorted(order[0]) == sorted(orders[0][0]) for order in orders)
    assert str(orders[1]) == str(tuple(each.choices for each in read(MADE / "mmlu_pro.jsonl", choice_seed=1)))
    answers = {read(MADE / "gpqa_d.csv", choice_seed=seed)[0].answer for seed in range(30)}
    assert answers == set("ABCD")


def test_the_order_of_the_file_stays_where_it_means_something(tmp_path):
    as_given = read(MADE / "arc_c.jsonl", choice_seed=-1)
    assert [each.answer for each in as_given] == ["B", "A", "D"]
    row = {"question": "q", "options": ["a", "b", "c", "d"], "answer": "C"}
    kept = [
        {**row, "solution": "It is c, so C."},
        {**row, "options": ["one", "two", "both A and B", "none of the above"]},
        {**row, "options": ["one", "two", "three", "All of these"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*kept, row])))
    for seed in range(6):
        examples = read(file, choice_seed=seed)
        assert [each.answer for each in examples[:3]] == ["C", "C", "C"]
        assert [each.choices for each in examples[:3]] == [
            ["a", "b", "c", "d"],
            *(each["options"] for each in kept[1:]),
        ]
    assert len({read(file, choice_seed=seed)[3].answer for seed in range(20)}) > 1


def test_the_side_of_a_question_does_not_follow_from_the_order_of_its_options():
    hashes = [[prompt_hash(each) for each in read(MADE / "mmlu_pro.jsonl", choice_seed=seed)] for seed in (-1, 1, 2)]
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes[0])) == 2


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q", "choices": ["a", "b", "c"], "answer": 2}, "c"),  # MMLU
        ({"question": "q", "choices": ["3", "4", "5"], "answer": 0}, "3"),
        ({"question": "q", "options": ["a", "b", "c"], "answer_index": 1}, "b"),
        ({"question": "q", "options": ["a", "b", "c"], "answer": "b"}, "b"),  # by its text
        ({"question": "q", "options": ["7", "8"], "answer": "8"}, "8"),
        ({"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}, "b"),
        (
            {"question": "q", "choices": [{"label": "A", "text": "a"}, {"label": "B", "text": "b"}], "answerKey": "A"},
            "a",
        ),
        ({"question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c"}, "a"),  # SciQ
        ({"question": "q", "choices": "['a', 'b']", "answer": "1"}, "b"),  # a cell of a table
        ({"question": "q", "choices": '{"text": ["a", "b"], "label": ["A", "B"]}', "answerKey": "B"}, "b"),
    ],
)
def test_other_sets_have_such_forms_too(tmp_path, row, right):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    (one,) = read(file)
    assert one.choices["ABC".index(one.answer)] == right and one.prompt.startswith("q\n\nA. ")


def broken(file: str, **changes) -> dict:
    return {**json.loads((MADE / file).read_text().splitlines()[0]), **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (broken("aime24.jsonl", problem=None), "the column 'prompt' or 'messages' is missing"),
        (broken("aime24_by_year.jsonl", Problem=""), "Problem: expected text or a list of turns, found ''"),
        (broken("aime25.jsonl", answer={"value": 3}), "answer: expected text or a number, found {'value': 3}"),
        (broken("amc23.jsonl", problem="another?"), "the columns 'question' and 'problem' could both be the prompt"),
        (broken("amc_validation.jsonl", problem=["?"]), "problem: a turn is"),
        (broken("math500.jsonl", answer=[1, 2]), "answer: expected text or a number, found [1, 2]"),
        (broken("minerva.jsonl", solution={"text": "a"}), "solution: expected text or a list of turns, found {"),
        (broken("olympiadbench.jsonl", context="A passage."), "the column 'context' would not be seen"),
        (broken("olympiadbench.jsonl", image_1="x.png", images=["x.png"]), "the column 'images' would not be seen"),
        (broken("arc_c.jsonl", answerKey="E"), "answerKey: expected one of A, B, C, D, a place from 0, or the text of"),
        (broken("arc_c.jsonl", answerKey=None), "options without the right one: a column answer, answerKey or answer_"),
        (
            broken("arc_c.jsonl", choices={"text": ["a", "b"], "label": ["A"]}),
            "choices: expected a label for each of 2",
        ),
        (broken("arc_c.jsonl", choices={"text": ["a"], "label": ["A"]}), "choices: expected 2 to 26 options, found 1"),
        (broken("arc_c.jsonl", choices=7), "the column 'choices' would not be seen"),
        (broken("mmlu_pro.jsonl", answer_index=4), "answer 'B' and answer_index 4 are not the same option"),
        (broken("mmlu_pro.jsonl", answer="K"), "answer: expected one of A, B, C, D, E, F, G, H, I, J, a place"),
        (broken("mmlu_pro.jsonl", options=["a", None]), "options: expected the text of an option, found None"),
        (broken("mmlu_pro.jsonl", options=["a", "b", "b"]), "options: the right option 'b' is there twice"),
        ({"question": "q", "options": ["1", "0"], "answer": "1"}, "answer '1' may be several options; mend the row"),
        ({"question": "q", "options": ["x", "y"], "answer": True}, "answer: expected one of A, B"),
    ],
)
def test_a_broken_row_is_told_with_file_and_line(tmp_path, row, message):
    file = tmp_path / "made.jsonl"
    file.write_text((MADE / "aime25.jsonl").read_text() + json.dumps(row))
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:3: {message}")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("Correct Answer", "Correct Answer: expected the text of an option, found None"),
        ("Question", "the column 'prompt' or 'messages' is missing"),
    ],
)
def test_a_broken_row_of_gpqa_is_told_with_file_and_line(tmp_path, column, message):
    rows = list(csv.DictReader(io.StringIO((MADE / "gpqa_d.csv").read_text())))
    rows[1][column] = ""
    file = tmp_path / "gpqa.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:4: {message}")


def test_choices_can_be_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "options": ["a", "b"], "answer": "B"}')
    (one,) = read(file, columns={"choices": "", "prompt": "question"})
    assert one.prompt == "q" and one.choices is None and one.columns["options"] == ["a", "b"]


def rows(tmp_path, *values: dict, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, values)))
    return read(file, **settings)


@pytest.mark.parametrize(
    "apart", [{"correct_answer": "y", "distractor1": "x"}, {"A": "x", "B": "y", "C": "z"}, {"choices": ["x", "y"]}]
)
def test_what_is_called_a_prompt_is_the_whole_of_it(tmp_path, apart):
    prompt = "q?\nA. x\nB. y"
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "B"}]
    for row in ({"prompt": prompt, "completion": "B"}, {"messages": chat}):
        (one,) = rows(tmp_path, {**row, **apart})
        assert (one.prompt, one.demonstration, one.choices) == (prompt, "B", None)
    (named,) = rows(tmp_path, {"question": prompt, "answer": "B", **apart}, columns={"prompt": "question"})
    assert named.prompt == prompt and named.choices is None and named.answer == "B"


def test_options_in_columns_of_their_letters(tmp_path):
    row = {"Question": "q?", "A": "a1", "B": "b1", "C": "c1", "D": "d1", "Answer": "B", "Subject": "x"}  # MMMLU's
    for seed in range(4):
        (one,) = rows(tmp_path, row, choice_seed=seed)
        assert one.choices["ABCD".index(one.answer)] == "b1" and sorted(one.choices) == ["a1", "b1", "c1", "d1"]
    (kept,) = rows(tmp_path, row, choice_seed=-1)
    assert kept.answer == "B" and kept.choices == ["a1", "b1", "c1", "d1"]


@pytest.mark.parametrize("more", [{"article": "An article."}, {"premise": "It rains."}, {"image_1": "x.png"}])
def test_a_question_that_needs_more_than_is_seen_is_refused(tmp_path, more):
    with pytest.raises(UserError, match=f"rows.jsonl:1: the column '{next(iter(more))}' would not be seen"):
        rows(tmp_path, {"question": "q?", "options": ["x", "y"], "answer": "A", **more})
    with pytest.raises(UserError, match=r"rows.jsonl:1: the column 'choices' would not be seen"):
        rows(tmp_path, {"question": "q?", "answer": "A", "choices": []})


def test_columns_that_tell_the_right_option_have_to_agree(tmp_path):
    blood = {"question": "q?", "options": ["O", "A", "B", "AB"], "answer": "B"}
    with pytest.raises(UserError, match="answer 'B' may be several options"):  # its letter, or its text
        rows(tmp_path, blood)
    (one,) = rows(tmp_path, {**blood, "answer_letter": "C"}, choice_seed=-1)
    assert one.answer == "C"
    for key in ("1", 1.0, 1):
        with pytest.raises(UserError, match=r"answer 'A' and answer_index .* are not the same option"):
            rows(tmp_path, {"question": "q?", "options": ["x", "y"], "answer": "A", "answer_index": key})


def test_options_lose_letters_of_their_own(tmp_path):
    for options in (["A)21", "B)22", "C)23"], ["(A) 21", "(B) 22", "(C) 23"], ["A. 21", "B. 22", "C. 23"]):
        (one,) = rows(tmp_path, {"question": "q", "options": options, "answer": "B"}, choice_seed=1)
        assert sorted(one.choices) == ["21", "22", "23"] and one.choices["ABC".index(one.answer)] == "22"
    (one,) = rows(tmp_path, {"question": "q", "options": ["A. a", "A. b"], "answer": "B"}, choice_seed=-1)
    assert one.choices == ["A. a", "A. b"]


def test_options_that_are_in_the_question_too_are_refused(tmp_path):
    row = {"question": "q?\nA. x\nB. y\nC. z", "options": ["x", "y", "z"], "answer": "C"}
    with pytest.raises(UserError, match=r'rows.jsonl:1: the question has its options in it.* = \{choices = ""\}'):
        rows(tmp_path, row)
    (one,) = rows(tmp_path, row, columns={"choices": ""})
    assert one.prompt == row["question"] and one.answer == "C" and one.choices is None


def test_options_without_an_order_are_always_given_one(tmp_path):
    values = [
        {"question": f"q{i}?", "correct_answer": "y", "distractor1": "x", "solution": "It is y."} for i in range(20)
    ]
    for seed in (-1, 3):
        assert {each.answer for each in rows(tmp_path, *values, choice_seed=seed)} == {"A", "B"}
    spoken = {"question": "q?", "correct_answer": "all of the above", "distractor1": "x", "distractor2": "y"}
    assert {rows(tmp_path, spoken, choice_seed=seed)[0].answer for seed in range(6)} == {"C"}
    with pytest.raises(UserError, match="an option names another by its letter, and the options have no order"):
        rows(tmp_path, {**spoken, "distractor3": "both A and B"})


@pytest.mark.parametrize(
    "option",
    [
        *(
            "none of the above",
            "all of these",
            "(A) and (B)",
            "A & B",
            "A/B",
            "A, C",
            "B only",
            "Only A",
            "Choice A",
            "Same as A",
        ),
        *(
            "as in (a)",
            "Both 1 and 2",
            "the first two",
            "Both answers are correct",
            "All answers are correct",
            "neither A nor B",
        ),
    ],
)
def test_an_option_that_speaks_of_others_keeps_the_order(tmp_path, option):
    row = {"question": "q?", "options": ["x", "y", "z", option], "answer": "C"}
    assert all(rows(tmp_path, row, choice_seed=seed)[0].answer == "C" for seed in range(5))


def test_an_option_is_on_one_line(tmp_path):
    (one,) = rows(tmp_path, {"question": "q?", "options": ["a\nB. b", "c"], "answer": "A"}, choice_seed=-1)
    assert one.choices == ["a B. b", "c"]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (
            {"question": "q", "reward_model": {"ground_truth": '["f(1) == 2", "f(2) == 3"]'}},
            '["f(1) == 2", "f(2) == 3"]',
        ),
        ({"question": "q", "ground_truth": ["Paris", "City of Paris"]}, None),
        ({"question": "q", "final_answer": ["2", "3"]}, "2, 3"),
        ({"question": "q", "final_answer": "['2', '3']"}, "2, 3"),  # a cell of a table
        ({"question": "q", "final_answer": "[0, 1]"}, "[0, 1]"),  # an interval
        ({"question": "q", "solution": "#### Step 1\nso \\boxed{5}"}, "5"),
        ({"question": "q", "solution": "so \\boxed{\\frac{1}{2}} and \\boxed{\\{1, 2\\}}."}, "\\{1, 2\\}"),
        ({"question": "q", "solution": "so \\fbox{5}"}, "5"),
        ({"question": "q", "solution": "so \\boxed 5"}, "5"),
        ({"question": "q", "solution": "so \\boxed{5 and no end"}, None),
        ({"question": "q", "solution": "so \\boxed{\\left\\{ x \\right.} end"}, "\\left\\{ x \\right."),
        ({"question": "q", "solution": "so \\boxed{5}", "answer": ""}, "5"),
        ({"question": "q", "response": "so \\boxed{5}"}, None),  # somebody's, right or wrong
    ],
)
def test_answers_of_other_forms(tmp_path, row, answer):
    assert rows(tmp_path, row)[0].answer == answer


def test_a_column_beside_the_prompt_is_no_other_prompt(tmp_path):
    assert rows(tmp_path, {"input": "q", "question_stem": "r", "answer": "1"})[0].prompt == "q"


@pytest.mark.parametrize("question", ["q? (A) x (B) y (C) z", "q? A. x, B. y, C. z", "q?\nA: x\nB: y\nC: z"])
@pytest.mark.parametrize("options", [{"options": ["x", "y", "z"]}, {"A": "x", "B": "y", "C": "z"}])
def test_a_question_with_its_options_behind_letters_is_refused_too(tmp_path, question, options):
    with pytest.raises(UserError, match=r"rows.jsonl:1: the question has its options in it"):
        rows(tmp_path, {"question": question, **options, "answer": "A"})


@pytest.mark.parametrize("blank", [None, "", " ", float("nan")])
def test_what_is_blank_is_not_there(tmp_path, blank):
    lettered = {"question": "q?", "A": "x", "B": "y", "C": blank, "answer": "B"}
    apart = {"question": "q?", "Correct Answer": "y", "Incorrect Answer 1": "x", "Incorrect Answer 2": blank}
    keyed = {"question": "q?", "options": ["x", "y"], "answer": "B", "answer_idx": blank, "answerKey": blank}
    other = {"question": "q?", "options": ["x", "y"], "answer": blank, "answerKey": "B"}
    for row in (lettered, apart, keyed, other):
        (one,) = rows(tmp_path, row)
        assert one.choices["AB".index(one.answer)] == "y"
    with pytest.raises(UserError, match="Correct Answer: expected the text of an option"):
        rows(tmp_path, {**apart, "Correct Answer": blank})


@pytest.mark.parametrize("key", ["B", "(B)", "B.", "b", "B. two words", "two\nwords", "B) two words", "1", 1, 1.0])
def test_a_key_may_be_written_in_many_ways(tmp_path, key):
    row = {"question": "q?", "options": ["A) one", "B) two\nwords", "C) three"], "answer": key}
    (one,) = rows(tmp_path, row, choice_seed=-1)
    assert one.answer == "B" and one.choices == ["one", "two words", "three"]


def test_letters_that_are_no_options_are_columns(tmp_path):
    (one,) = rows(tmp_path, {"question": "What is A + B?", "A": 2, "B": 3, "answer": "5"})
    assert one.choices is None and one.columns["A"] == 2
