"""Functions that users bring: where they are found, and the forms in which they are called."""

import sys

import pytest

from srft.config import RewardConfig
from srft.data import Example
from srft.errors import UserError
from srft.rewards import build_reward
from srft.rewards.functions import SIGNATURE
from tests.srft.rewards.conftest import FILE, example


def theirs(function, monkeypatch, **settings):
    """The scorer of a function that is called in this process."""
    monkeypatch.setitem(sys.modules, "their", type("module", (), {"reward": staticmethod(function)}))
    return build_reward(RewardConfig("their:reward", workers=0, **settings), FILE)


async def asynchronous(completions, **kwargs):
    return [1.0 for _ in completions]


async def asynchronous_of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == "a")}


class Callable:
    async def __call__(self, prompts, completions, **columns):
        return [1.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: [1.0] * len(completions),
        lambda prompts, completions, answer: [float(a == "4") for a in answer],
        lambda p, c, *, level: [float(each == 2 and c == ["a"]) for each in level],
        lambda prompts, completions, /, task, unknown=None: [float(each == "train" and not unknown) for each in task],
        lambda *given: [float(len(given) == 2 and given[1] == ["a"])],
        # TRL's
        lambda completions: [float(completions == ["a"])],
        lambda completions, answer: [float(completions == ["a"] and answer == ["4"])],
        lambda answer, prompts, completions: [float(completions == ["a"] and prompts == ["2 + 2?"])],
        lambda *, prompts, completions: [float(completions == ["a"] and prompts == ["2 + 2?"])],
        lambda completions, **rest: [float(set(rest) == {"prompts", "answer", "demonstration", "task", "level", "x"})],
        lambda completion_ids, **kwargs: [float(completion_ids == [[7, 8]] and kwargs["completions"] == ["a"])],
        lambda completions, completion_ids, finished: [float(completion_ids == [[7, 8]] and finished == [False])],
        lambda **kwargs: [float(kwargs["completions"] == ["a"] and "finished" not in kwargs)],
        asynchronous,
        Callable(),
        # verl's
        lambda data_source, solution_str, ground_truth, extra_info: float(
            (data_source, solution_str, ground_truth, extra_info) == ("train", "a", "4", {})
        ),
        lambda solution_str, ground_truth, level, **kwargs: float(level == 2 and not kwargs),
        asynchronous_of_verl,
    ],
)  # fmt: skip
def test_a_function_gets_what_it_names(function, monkeypatch):
    given = theirs(function, monkeypatch)(
        [example("4", level=2, x=3)], ["a"], finished=[False], completion_ids=[[7, 8]]
    )
    assert given == [1.0]


def test_verl_reads_its_own_columns(monkeypatch):
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return 0.5

    rows = [example("4", data_source="gsm8k", ground_truth="72", extra_info={"index": i}) for i in range(2)]
    assert theirs(compute_score, monkeypatch)(rows, ["a", "b"]) == [0.5, 0.5]
    assert seen == [("gsm8k", "a", "72", {"index": 0}), ("gsm8k", "b", "72", {"index": 1})]


def test_an_async_function_is_called_within_a_running_loop_too(monkeypatch):
    import asyncio

    async def notebook():
        return theirs(asynchronous, monkeypatch)([example()], ["a"])

    assert asyncio.run(notebook()) == [1.0]


def test_completions_are_chats_where_that_is_asked_for(monkeypatch):
    def of_trl(prompts, completions, **kwargs):
        assert [chat[-1]["role"] for chat in prompts] == ["user", "user"]
        return [
            float(completion[0]["content"] == "4" and completion[0]["role"] == "assistant")
            for completion in completions
        ]

    chat = Example([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], None, None, "train", {})
    assert theirs(of_trl, monkeypatch, conversational=True)([example(), chat], ["4", "5"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"reward\.conversational = true"):
        theirs(lambda completions: [c[0]["content"] for c in completions], monkeypatch)([example()], ["4"])


def test_a_function_sees_text_prompts_chats_and_missing_columns(monkeypatch):
    chat = Example([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], None, None, "train", {})
    scorer = theirs(
        lambda prompts, completions, x: [len(p) + 10 * (e is None) for p, e in zip(prompts, x)], monkeypatch
    )
    assert scorer([example(prompt="four", x=1), chat], ["", ""]) == [4.0, 12.0]


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (lambda text: [], "(text)"),
        (lambda completion, answer: [], "(completion, answer)"),
        (lambda prompts, answer: [], "(prompts, answer)"),
        (lambda prompts, answer, **kwargs: [], "(prompts, answer, **kwargs)"),
        (lambda completions, answer, /: [], "(completions, answer, /)"),
        (lambda prompts, completions, answer, /: [], "(prompts, completions, answer, /)"),
        (lambda data_sources, solution_strs, ground_truths: [], "(data_sources, solution_strs, ground_truths)"),
        (lambda solution_str, /, ground_truth: [], "(solution_str, /, ground_truth)"),
    ],
)
def test_a_function_of_another_signature_is_refused_at_once(function, signature, monkeypatch):
    with pytest.raises(UserError) as error:
        theirs(function, monkeypatch)
    assert str(error.value) == f"reward.name 'their:reward': expected {SIGNATURE}, found the signature {signature}"


def test_a_function_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    folder = tmp_path / "my rewards.v2"
    folder.mkdir()
    (folder / "beside_it.py").write_text("VALUE = 0.25")
    (folder / "math.py").write_text(
        "from beside_it import VALUE\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
        "def reward(completions, **kwargs):\n    return [VALUE for _ in completions]\n"
    )
    for workers in (0, 1):
        scorer = build_reward(RewardConfig(f"{folder}/math.py:reward", workers=workers), FILE)
        assert scorer([example()], ["a"]) == [0.25]
    monkeypatch.chdir(folder)
    assert build_reward(RewardConfig("math.py:reward", workers=0), FILE)([example()], ["a"]) == [0.25]
    with pytest.raises(UserError, match=r"has no function 'rewart'; did you mean 'reward'\?"):
        build_reward(RewardConfig("math.py:rewart"), FILE)
    with pytest.raises(UserError, match=r"reward\.name 'nowhere\.py:f': there is no file nowhere\.py"):
        build_reward(RewardConfig("nowhere.py:f"), FILE)
    (folder / "broken.py").write_text("def")
    with pytest.raises(UserError, match=r"importing 'broken\.py' raised SyntaxError"):
        build_reward(RewardConfig("broken.py:f"), FILE)
