import itertools
import math

import pytest

from srft.config import DataConfig, EvalConfig
from srft.data import Example, Problem, Prompter, build_prompter
from srft.errors import UserError
from srft.evaluate import evaluate
from srft.evaluation import pass_at_k, table
from srft.rewards import Scorer
from srft.rollout import Engine, Rollout


@pytest.mark.parametrize("n, correct, k", [(4, 0, 2), (4, 1, 1), (5, 2, 3), (6, 6, 4), (6, 3, 6), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, correct, k):
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(min(s) < correct for s in subsets) / len(subsets))


class Scripted(Engine):
    """Says the sample's number; the prompts are answered in order."""

    def generate(self, prompts, samples, *, seed, batch_size, **settings):
        self.seed, self.batch_size, self.settings = seed, batch_size, settings
        return [[Rollout([ord(str(i)) + 2 - 33, 0], True) for i in range(samples)] for _ in prompts]


def problems(prompter: Prompter, *tasks: str) -> list[Problem]:
    turns = [{"role": "user", "content": f"q{i}"} for i in range(len(tasks))]
    return [prompter.problem(Example([turn], None, str(i), task)) for i, (turn, task) in enumerate(zip(turns, tasks))]


def scores(tiny, tasks, rewards, samples=4):
    prompter = build_prompter(tiny.tokenizer, DataConfig(system_prompt=""))
    scorer = Scorer("test", lambda prompts, completions, **columns: rewards)
    engine = Scripted()
    result = evaluate(engine, problems(prompter, *tasks), prompter, scorer, EvalConfig(samples=samples, seed=5), 7)
    assert engine.batch_size == EvalConfig().batch_size
    assert engine.seed == 5 and engine.settings == {"max_new_tokens": 7, "temperature": 1.0, "top_p": 1.0}
    return result


def test_means_over_prompts_and_per_task(tiny):
    result = scores(tiny, ["a", "b", "a"], [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0.5])
    assert result.reward == pytest.approx((0.25 + 0 + 0.875) / 3)
    assert result.pass_at == pytest.approx({1: (0.25 + 0 + 0.75) / 3, 2: (0.5 + 0 + 1) / 3, 4: 2 / 3})
    assert result.tasks["a"].reward == pytest.approx((0.25 + 0.875) / 2) and result.tasks["a"].prompts == 2
    assert result.tasks["b"].pass_at == {1: 0.0, 2: 0.0, 4: 0.0}
    assert result.finished == 1.0 and result.tokens == 2.0
    first = result.generations[0]
    assert first["task"] == "a" and first["rewards"] == [1, 0, 0, 0] and len(first["completions"]) == 4
    lines = table(result).splitlines()
    assert lines[0].split() == [
        "task",
        "prompts",
        "avg@4",
        "95",
        "%",
        "pass@1",
        "pass@2",
        "pass@4",
        "finished",
        "tokens",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "all"]


def test_unscored_completions_are_left_out(tiny):
    result = scores(tiny, ["a", "a", "a"], [1, None, None, 0, None, None, None, None, 1, 1, 1, 1])
    assert result.reward == pytest.approx((0.5 + 1) / 2)
    assert result.pass_at == pytest.approx({1: 0.75, 2: 1.0, 4: 1.0})
    partly = scores(tiny, ["a", "b"], [1, 1, 1, 1, None, None, None, None])
    assert partly.reward == 1 and math.isnan(partly.tasks["b"].reward)
    table(partly)


def test_an_evaluation_without_any_reward_is_an_error(tiny):
    with pytest.raises(UserError, match=r"'test': none of 4 completions of 1 held-out prompts was scored"):
        scores(tiny, ["a"], [None] * 4)


def test_a_sample_count_that_is_no_power_of_two_is_reported_too(tiny):
    assert list(scores(tiny, ["a"], [0] * 6, samples=6).pass_at) == [1, 2, 4, 6]


def test_a_reward_is_told_which_completions_were_cut_off_and_their_tokens(tiny):
    class Cut(Engine):
        def generate(self, prompts, samples, **settings):
            return [[Rollout([16 + i], bool(i)) for i in range(samples)] for _ in prompts]

    def reward(completions, finished, completion_ids):
        return [float(each) + ids[0] for each, ids in zip(finished, completion_ids)]

    prompter = build_prompter(tiny.tokenizer, DataConfig(system_prompt=""))
    result = evaluate(Cut(), problems(prompter, "a"), prompter, Scorer("test", reward), EvalConfig(samples=2), 7)
    assert result.generations[0]["rewards"] == [16.0, 18.0]
