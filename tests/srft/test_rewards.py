"""Rewards: extraction, exact match, math-verify, the tasks' scorers, and functions that misbehave."""

import sys

import numpy
import pytest
import torch

from srft.config import DataConfig, RewardConfig
from srft.data import Example, load_examples
from srft.errors import UserError
from srft.rewards import Scorer, build_reward, check_answers, final_answer, same

FILE = DataConfig(train_file="train.jsonl")


def example(answer=None, prompt="2 + 2?", **columns):
    return Example([{"role": "user", "content": prompt}], "4", answer, "train", columns)


def write_module(tmp_path, monkeypatch, body):
    """A module with that reward function in the current directory, as a user would have it."""
    name = f"module_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(f"def reward(prompts, completions, **columns):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return build_reward(RewardConfig(f"{name}:reward"), FILE)


@pytest.mark.parametrize(
    ("completion", "numeric", "expected"),
    [
        ("1 + 1 = 2\n#### 2", True, "2"),
        ("#### 1\n#### 1,234.5 apples, not 7", True, "1,234.5"),
        ("The answer is 14.", True, "14"),
        ("5-3 gives 2, so x=-4", True, "-4"),
        ("from 5-3", True, "3"),  # a minus between numbers is no sign
        ("no idea", True, ""),
        ("####", True, ""),
        (r"so \boxed{\frac{1}{2}} holds", False, r"\frac{1}{2}"),
        ("####  Paris \n", False, "Paris"),
        ("Paris", False, "Paris"),
    ],
)
def test_final_answer(completion, numeric, expected):
    assert final_answer(completion, numeric) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("#### 14", "14", True),
        ("#### 114", "14", False),
        ("it is 1,000.00", "1000", True),
        ("#### 5", "a long solution with 3\n#### 5", True),
        ("#### paris.", "Paris", True),
        ("London", "Paris", False),
        ("", "4", False),
    ],
)
def test_exact(completion, answer, expected):
    assert same(completion, answer) is expected
    assert build_reward(RewardConfig("exact"), FILE)([example(answer)], [completion]) == [float(expected)]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"We get $\frac{1}{2}$", "0.5", 1.0),
        ("#### 1/2", r"\frac{1}{2}", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        ("#### x^2 + 2x + 1", "(x+1)^2", 1.0),
        ("#### 3", "4", 0.0),
        ("#### Paris", "Paris", 1.0),
        ("", "4", 0.0),
    ],
)
def test_math_verify(completion, answer, expected):
    pytest.importorskip("math_verify")
    assert build_reward(RewardConfig(), FILE)([example(answer)], [completion]) == [expected]


def test_without_an_answer_nothing_is_scored():
    pytest.importorskip("math_verify")
    for name in ("exact", "math_verify", "auto"):
        scorer = build_reward(RewardConfig(name), FILE)
        assert scorer([example(), example("4")], ["4", "4"]) == [None, 1.0]
        assert scorer([], []) == []


def test_a_wrong_number_earns_nothing_from_a_task():
    pytest.importorskip("reasoning_gym")
    data = DataConfig()
    one = load_examples(data, "train", 1)[0]
    completions = [
        f"It is {one.answer}",
        f"#### 1{one.answer}",
        f"#### {one.answer} 7",
        "",
        "no number",
        f"#### x\n{one.answer}",
    ]
    assert build_reward(RewardConfig(), data)([one] * 6, completions) == [1, 0, 1, 0, 0, 1]


def test_a_graded_task_keeps_its_own_scale():
    pytest.importorskip("reasoning_gym")
    data = DataConfig(tasks=["word_sorting"])
    one = load_examples(data, "train", 1)[0]
    right, wrong = build_reward(RewardConfig(), data)([one] * 2, [f"Sorted:\n#### {one.answer}", "nothing"])
    assert right == 1.0 and 0 <= wrong < 1


def test_a_function_gets_prompts_completions_and_columns(tmp_path, monkeypatch):
    body = "return [float(c == a) + n for p, c, a, n in zip(prompts, completions, columns['answer'], columns['level'])]"
    scorer = write_module(tmp_path, monkeypatch, body)
    assert scorer([example("4", level=1), example("5", level=2)], ["4", "4"]) == [2.0, 2.0]


def test_a_function_sees_text_prompts_chats_and_missing_columns(tmp_path, monkeypatch):
    scorer = write_module(
        tmp_path, monkeypatch, "return [len(p) + 10 * (x is None) for p, x in zip(prompts, columns['x'])]"
    )
    chat = Example([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], None, None, "train", {})
    assert scorer([example(prompt="four", x=1), chat], ["", ""]) == [4.0, 12.0]


@pytest.mark.parametrize(
    "rewards",
    [numpy.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), (1, 0.5), [True, numpy.float32(0.5)], [1.0, torch.tensor(0.5)]],
)
def test_what_counts_as_a_list_of_rewards(rewards, monkeypatch):
    monkeypatch.setitem(sys.modules, "their", type("module", (), {"reward": staticmethod(lambda *_, **__: rewards)}))
    assert build_reward(RewardConfig("their:reward"), FILE)([example()] * 2, ["a", "b"]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [1.0]", "returned 1 rewards for 2 completions; return one number, or None, per completion"),
        ("return 1.0", "returned float, expected a list with one reward per completion"),
        ("return None", "returned NoneType, expected a list with one reward per completion"),
        ("return ['good', 1]", "reward 0 is 'good', expected a finite number or None"),
        ("return [1, float('nan')]", "reward 1 is nan, expected a finite number or None"),
        ("return columns['labels']", "the function raised KeyError: 'labels' (--debug shows where)"),
    ],
)
def test_a_function_that_misbehaves_is_named(tmp_path, monkeypatch, body, expected):
    scorer = write_module(tmp_path, monkeypatch, body)
    with pytest.raises(UserError) as error:
        scorer([example(), example()], ["a", "b"])
    assert str(error.value) == f"reward.name 'module_{tmp_path.name}:reward': {expected}"


def test_the_traceback_of_a_function_is_kept_for_debug(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        write_module(tmp_path, monkeypatch, "raise ValueError('no')")([example()], ["a"])
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (
            "exakt",
            FILE,
            "reward.name: expected auto, exact, math_verify, reasoning_gym or package.module:function, found 'exakt'",
        ),
        ("reasoning_gym", FILE, "reward.name: 'reasoning_gym' scores generated tasks, not data.train_file"),
        (
            "no_such_module:f",
            FILE,
            "reward.name 'no_such_module:f': importing 'no_such_module' raised ModuleNotFoundError: ",
        ),
        ("math:sqroot", FILE, "reward.name 'math:sqroot': math has no function 'sqroot'; did you mean 'sqrt'?"),
        ("math:pi", FILE, "reward.name 'math:pi': math has no function 'pi', it is of type float"),
        ("math:inff", FILE, "reward.name 'math:inff': math has no function 'inff'; did you mean 'isinf'?"),
        ("rw:", FILE, "reward.name: expected package.module:function, found 'rw:'"),
        (":f", FILE, "reward.name: expected package.module:function, found ':f'"),
    ],
)
def test_wrong_names(name, data, expected):
    with pytest.raises(UserError) as error:
        build_reward(RewardConfig(name), data)
    assert str(error.value).startswith(expected)


def theirs(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "their", type("module", (), {"reward": staticmethod(function)}))
    return build_reward(RewardConfig("their:reward"), FILE)


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: [1.0] * len(completions),
        lambda prompts, completions, answer: [float(a == "4") for a in answer],
        lambda p, c, *, level: [float(each == 2) for each in level],
        lambda prompts, completions, /, task, unknown=None: [float(each == "train" and not unknown) for each in task],
        lambda *given: [float(len(given) == 2)],
    ],
)
def test_a_function_gets_only_the_columns_that_it_names(function, monkeypatch):
    assert theirs(function, monkeypatch)([example("4", level=2, other=3)], ["a"]) == [1.0]


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (lambda completions: [], "(completions)"),
        (lambda completions, answer: [], "(completions, answer)"),
        (lambda answer, prompts, completions: [], "(answer, prompts, completions)"),
        (lambda *, prompts, completions: [], "(*, prompts, completions)"),
        (lambda prompts, completions, answer, /: [], "(prompts, completions, answer, /)"),
    ],
)
def test_a_function_of_another_signature_is_refused_at_once(function, signature, monkeypatch):
    with pytest.raises(UserError) as error:
        theirs(function, monkeypatch)
    expected = "def reward(prompts, completions, **columns) -> list[float | None]"
    assert str(error.value) == f"reward.name 'their:reward': expected {expected}, found the signature {signature}"


def test_a_file_without_answers_is_refused_and_one_with_some_warns(capsys):
    exact, own = build_reward(RewardConfig("exact"), FILE), Scorer("own", lambda prompts, completions: [])
    misspelt = [example(answers="4", level=1), example(answers="5", level=1)]
    expected = (
        "train.jsonl: reward.name 'exact' compares with the column 'answer', which no row has; found besides the "
        "prompt: answers, level, demonstration; did you mean 'answers'? (rename it, or take another reward.name)"
    )
    for given in ((misspelt, []), ([example("4")], misspelt)):
        with pytest.raises(UserError) as error:
            check_answers(exact, FILE, *given)
        assert str(error.value) == expected
    with pytest.raises(UserError, match=r"^held\.jsonl: "):
        check_answers(exact, DataConfig(train_file="train.jsonl", eval_file="held.jsonl"), misspelt)
    check_answers(own, FILE, misspelt, misspelt)
    check_answers(exact, FILE, [example("4")], [example("4")] * 3)
    assert capsys.readouterr().err == ""
    check_answers(exact, FILE, [example("4")], [example("4"), example(), example()])
    told = capsys.readouterr().err
    assert told.startswith("warning: train.jsonl: ") and told.endswith("2 of 3 rows drawn lack it and are not scored\n")
