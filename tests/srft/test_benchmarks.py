"""Benchmark sets: what eval.sets may be, and rows that cannot be graded."""

import json
from pathlib import Path

import pytest

from srft.benchmarks import load_sets
from srft.data import load_examples
from srft.data.examples import prompt_hash
from srft.errors import UserError
from srft.settings import load

MADE = Path(__file__).parents[1] / "data" / "benchmarks"


def sets(*entries: str, options: tuple[str, ...] = ()):
    return load_sets(load(None, ["--eval.sets", *map(str, entries), *options]))


def test_a_set_has_settings_of_its_own():
    file = MADE / "olympiadbench.jsonl"
    own = 'name = "OB", group = "g", samples = 7, prompts = 2, columns = {answer = "final_answer"}'
    (one,) = sets(f'{{file = "{file}", {own}}}')
    assert (one.name, one.group, one.samples, len(one.examples)) == ("OB", "g", 7, 2)
    plain, limited = sets(file)[0], sets(file, options=("--eval.set_prompts", "1"))[0]
    assert (plain.name, plain.group, plain.samples, len(plain.examples)) == ("olympiadbench", "math-verify", 4, 3)
    assert len(limited.examples) == 1 and sets(MADE / "gpqa_d.csv")[0].group == "letter"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("none.jsonl", r"eval.sets\[1\]: none.jsonl: there is no such file"),
        ("none.*", r"eval.sets\[1\]: none.\*: no file of a known format"),
        ('{fil = "a"}', r"eval.sets\[1\]: unknown key 'fil'; did you mean 'file'"),
        ('{task = "chain_sums"}', r"eval.sets\[1\]: data.tasks: unknown task 'chain_sums'; did you mean 'chain_sum'"),
        ('{task = "chain_sum", file = "a"}', r"eval.sets\[1\]: a set is of a file or of a task, found both"),
        ('{task = "chain_sum", broken = "drop"}', r"eval.sets\[1\]: broken: a set of a task has none"),
        ('{file = "a", task_args = {}}', r"eval.sets\[1\]: task_args: a set of a file has none"),
        ('{task = "chain_sum", task_args = {max_term = 3}}', r"eval.sets\[1\]: data.task_args.chain_sum: unknown arg"),
        ('{name = "a"}', r"eval.sets\[1\]: file: a value is needed"),
        ('{file = "a", samples = 0}', r"eval.sets\[1\]: samples: expected a whole number of 1 at least, found 0"),
        ('{file = "a", temperature = -1}', r"eval.sets\[1\]: temperature: expected a number of 0 at least, found -1"),
        ('{file = "a", temperature = true}', r"eval.sets\[1\]: temperature: expected a number of 0 at least"),
        ('{file = "a", samples = true}', r"eval.sets\[1\]: samples: expected a whole number"),
        ('{file = ["a.jsonl", 3]}', r"eval.sets\[1\]: file: expected the name of a file, or several"),
        ('{file = ["a.jsonl", ""]}', r"eval.sets\[1\]: file: expected the name of a file, or several"),
        ('{file = "a", broken = "cut"}', r"eval.sets\[1\]: broken: expected error or drop, found 'cut'"),
        ("{file = 3}", r"eval.sets\[1\]: file: expected the name of a file, or several, found 3"),
        (f'{{file = "{MADE}/aime25.jsonl", columns = {{answer = "key"}}}}', "no row has a column 'key'"),
    ],
)
def test_what_is_no_set_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        sets(entry)


def test_two_sets_of_one_name_are_refused():
    with pytest.raises(UserError, match="two sets are called 'aime24'"):
        sets(MADE / "aime24.jsonl", MADE / "aime24.jsonl")


def test_a_row_that_cannot_be_graded_is_refused(tmp_path):
    file = tmp_path / "made.jsonl"
    file.write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": null, "level": 3}\n')
    with pytest.raises(
        UserError, match=r"eval.sets\[1\]: .*made.jsonl:2: no answer is known.*other columns: problem, level"
    ):
        sets(file)


def test_a_solution_without_its_answer_is_refused(tmp_path):
    file = tmp_path / "minerva.jsonl"
    file.write_text((MADE / "minerva.jsonl").read_text() + '{"problem": "a", "solution": "It is 3."}')
    with pytest.raises(UserError, match=r"minerva.jsonl:4: no answer is known"):
        sets(file)


def test_rows_may_be_left_out_and_are_counted(tmp_path, capsys):
    file = tmp_path / "made.jsonl"
    file.write_text(
        '{"problem": "a", "answer": "1"}\nno row\n{"problem": "b"}\n{"problem": "c", "answer": "\\\\boxed{}"}\n'
    )
    with pytest.raises(UserError, match=r"made.jsonl:2: not valid JSON"):
        sets(file, options=("--data.broken", "drop"))  # of the training data
    (one,) = sets(f'{{file = "{file}", broken = "drop"}}')
    assert [each.prompt for each in one.examples] == ["a"] and one.rows == 4
    assert "2 of 4 rows are left out; eval.sets[1]: " in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["", ".", "\\boxed{}"])
def test_an_answer_that_is_none_is_refused(tmp_path, answer):
    file = tmp_path / "made.jsonl"
    file.write_text(json.dumps({"problem": "a", "answer": answer}))
    with pytest.raises(UserError, match=r"made.jsonl:1: no answer is known"):
        sets(file)


def test_a_glob_that_meets_a_set_twice_is_refused(tmp_path):
    row = '{"problem": "a", "answer": "1"}'
    (tmp_path / "aime.jsonl").write_text(row)
    (tmp_path / "aime.json").write_text(f"[{row}]")
    with pytest.raises(UserError, match=r"aime.json and .*aime.jsonl are both meant; name one of them"):
        sets(tmp_path / "aime.*")


def test_a_directory_of_splits_says_which_to_name(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"problem": "a", "answer": "1"}')
    with pytest.raises(UserError, match=r"name those to measure on, such as .*test.jsonl"):
        sets(tmp_path)


def test_a_set_may_be_a_task():
    own, usual = sets('{task = "chain_sum", prompts = 9, task_args = {max_terms = 5}}', '{task = "leg_counting"}')
    assert (own.name, own.group, len(own.examples), own.rows) == ("chain_sum", "reasoning-gym", 9, 9)
    assert max(each.prompt.count(" + ") + each.prompt.count(" - ") for each in own.examples) > 2
    assert len(usual.examples) == 64 and own.task_args["chain_sum"] == {"max_terms": 5}
    trained = {prompt_hash(each) for each in load_examples(load().data, "train", 2000)}
    (same,) = sets('{task = "chain_sum", prompts = 200}')
    assert not trained & {prompt_hash(each) for each in same.examples}
