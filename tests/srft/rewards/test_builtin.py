"""The rewards that come with srft: exact, math_verify, and the scorers of generated tasks."""

import sys

import pytest

from srft.config import DataConfig, RewardConfig
from srft.data import Example, load_examples
from srft.errors import UserError
from srft.rewards import build_reward
from tests.srft.rewards.conftest import FILE, example


def scored(completions, answer, name="exact", data=FILE, finished=None, **settings):
    scorer = build_reward(RewardConfig(name, workers=0, **settings), data)
    return scorer([example(answer)] * len(completions), completions, finished=finished)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("#### 14", "14", 1.0),
        ("#### 114", "14", 0.0),
        ("it is 1,000.00", "1000", 1.0),
        ("#### 5", "a long solution with 3\n#### 5", 1.0),
        ("#### paris.", "Paris", 1.0),
        ("London", "Paris", 0.0),
        ("", "4", 0.0),
    ],
)
def test_exact(completion, answer, expected):
    assert scored([completion], answer) == [expected]


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
        # the e of Euler's number is no exponent of ten
        ("\\boxed{-1+2e}", "2e-1", 1.0),
        ("\\boxed{4e^2-4e+1}", "(2e-1)^2", 1.0),
        ("\\boxed{\\frac{-1+2e}{3}}", "\\frac{2e-1}{3}", 1.0),
        ("\\boxed{\\frac{0.2}{3}}", "\\frac{2e-1}{3}", 0.0),
        ("\\boxed{3+2e}", "2e+3", 1.0),
        ("\\boxed{1e9999999}", "5", 0.0),  # which math-verify would count for seconds
    ],
)
def test_math_verify(completion, answer, expected):
    pytest.importorskip("math_verify")
    assert scored([completion], answer, "auto") == [expected]
    if completion and completion[0] in "#\\":
        assert scored([f"so 7\n{completion}"], answer, "auto", mark="required") == [expected]


def test_math_verify_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"'math-verify' is needed for reward\.name 'math_verify': pip install"):
        build_reward(RewardConfig("math_verify"), FILE)


@pytest.mark.parametrize("name", ["exact", "math_verify"])
@pytest.mark.parametrize("answer", [None, "", " \n", "#### ", r"\boxed{}", "."])
def test_without_an_answer_nothing_is_scored(name, answer):
    pytest.importorskip("math_verify")
    scorer = build_reward(RewardConfig(name, workers=0), FILE)
    assert scorer([example(answer), example("4"), example(answer)], ["", "4", "."]) == [None, 1.0, None]
    assert scorer([], []) == []


def test_a_completion_that_is_cut_off_is_not_rewarded_for_its_last_number():
    cut = "1 + 4 = 5\nAdding 1 to 4,"
    told = DataConfig(train_file="train.jsonl", system_prompt="Answer after ####.")
    assert scored([cut, cut, "#### 4"], "4", finished=[False, True, False]) == [0.0, 1.0, 1.0]
    assert scored([cut, cut, "#### 4"], "4", data=told, finished=[False, True, False]) == [0.0, 0.0, 1.0]
    assert scored([cut, cut], "4", data=told, finished=[False, True], mark="any") == [0.0, 1.0]
    assert scored([cut, "#### 4"], "4", mark="required") == [0.0, 1.0]


def test_the_default_job_asks_for_a_mark(monkeypatch):
    pytest.importorskip("reasoning_gym")
    data = DataConfig()
    one = load_examples(data, "train", 1)[0]
    completions = [
        f"It is {one.answer}",
        f"#### 1{one.answer}",
        f"#### {one.answer} apples",
        "",
        "no number",
        f"#### x\n{one.answer}",
        f"… {one.answer} = 5\nAdding 1 to {one.answer},",
    ]
    scorer = build_reward(RewardConfig(), data)
    assert scorer([one] * 7, completions, finished=[True] * 6 + [False]) == [0, 0, 1, 0, 0, 0, 0]
    lenient = build_reward(RewardConfig(mark="any", workers=0), data)
    assert lenient([one] * 7, completions, finished=[True] * 6 + [False]) == [1, 0, 1, 0, 0, 0, 0]


def test_a_graded_task_keeps_its_own_scale():
    pytest.importorskip("reasoning_gym")
    data = DataConfig(tasks=["word_sorting"])
    one = load_examples(data, "train", 1)[0]
    scorer = build_reward(RewardConfig(workers=0), data)
    right, wrong = scorer([one] * 2, [f"Sorted:\n#### {one.answer}", "nothing"])
    assert right == 1.0 and 0 <= wrong < 1
    nameless = Example(one.messages, None, " ", one.task, one.columns)
    assert scorer([nameless], ["#### "]) == [None]


@pytest.mark.parametrize("name", ["exact", "math_verify"])
def test_a_question_with_options_is_graded_by_its_letter(name):
    texts = ["#### B", "\\boxed{\\text{(B)}}", "the Sun", "The answer is B", "#### C", "#### 2", "a mirror", "no idea"]
    one = Example([{"role": "user", "content": "?"}], None, "B", "t", choices=["the Moon", "the Sun", "a mirror"])
    scorer = build_reward(RewardConfig(name, workers=0), FILE)
    assert scorer([one] * len(texts), texts) == [1, 1, 1, 1, 0, 0, 0, 0]
    cut = scorer([one, one, example("B")], ["#### B", "It is B", "B"], finished=[False, False, True])
    assert cut == [1, 0, 1]  # beside a question without options


@pytest.mark.parametrize(
    "text", ["\\boxed{4.5 \\times 10^{33}}", "\\boxed{4.5e33}", "#### $45 \\cdot 10^{32}$", "4.5e+33"]
)
def test_math_verify_knows_exponents_of_ten(text):
    assert scored([text], "4.5e33", "math_verify") == [1.0]
    assert scored([text], "4.5e32", "math_verify") == [0.0]
