"""Generated tasks: disjoint sides, worked demonstrations that are right, and wrong names."""

import json
import os
import subprocess
import sys

import pytest

from srft.config import DataConfig, RewardConfig
from srft.data import load_examples
from srft.errors import UserError
from srft.rewards import build_reward

pytest.importorskip("reasoning_gym")
from srft.data.tasks import BY_CHANCE, BY_HASH, gym, worked_sum


def prompts(examples):
    return [each.prompt for each in examples]


def test_sides_share_no_prompt_whatever_the_seeds():
    held_out = set(prompts(load_examples(DataConfig(), "eval", 64)))
    assert len(held_out) == 64
    for seed in (0, 1, 17):
        train = prompts(load_examples(DataConfig(seed=seed), "train", 1000))
        assert len(set(train)) == 1000 and not held_out & set(train)


def test_neighbouring_seeds_differ():
    first, second = (set(prompts(load_examples(DataConfig(seed=seed), "train", 100))) for seed in (0, 1))
    assert len(first & second) < 50  # seed + index, as the generators do it, would share 99


def test_the_held_out_prompts_do_not_depend_on_the_training_seed():
    assert load_examples(DataConfig(seed=3), "eval", 8) == load_examples(DataConfig(seed=4), "eval", 8)
    assert load_examples(DataConfig(), "eval", 8) == load_examples(DataConfig(), "eval", 64)[:8]


def test_tasks_take_turns():
    config = DataConfig(tasks=["chain_sum", "gsm_symbolic", "leg_counting"])
    assert [each.task for each in load_examples(config, "train", 6)] == config.tasks * 2


def test_a_small_task_runs_dry_quietly():
    config = DataConfig(task_args={"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}})
    count = len(load_examples(config, "train", 1000)) + len(load_examples(config, "eval", 1000))
    assert 150 < count <= 200  # ten by ten digits, two signs


@pytest.mark.parametrize(
    ("expression", "solution"),
    [
        ("12 + 5 - 3", "12 + 5 = 17\n17 - 3 = 14\n#### 14"),
        ("2 - 9", "2 - 9 = -7\n#### -7"),
        ("-4 - -6 + 1", "-4 - -6 = 2\n2 + 1 = 3\n#### 3"),
        ("7", "#### 7"),
    ],
)
def test_worked_sum(expression, solution):
    assert worked_sum(expression) == solution


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic", "basic_arithmetic", "leg_counting"])
def test_demonstrations_earn_the_full_reward(task):
    config = DataConfig(tasks=[task])
    examples = load_examples(config, "train", 100)
    assert all("####" in each.demonstration for each in examples)
    assert build_reward(RewardConfig(), config)(examples, [each.demonstration for each in examples]) == [1.0] * 100


def test_a_task_without_a_reference_has_no_demonstration():
    example = load_examples(DataConfig(tasks=["propositional_logic"]), "train", 1)[0]
    assert example.answer is None and example.demonstration is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tasks": ["chain_summ"]}, "data.tasks: unknown task 'chain_summ'; did you mean 'chain_sum' or "),
        ({"tasks": ["zzz"]}, "data.tasks: unknown task 'zzz'; for example chain_sum, gsm_symbolic, basic_arithmetic"),
        ({"tasks": []}, "data.tasks: name at least one task, or give a data.train_file"),
        ({"task_args": {"chain": {}}}, "data.tasks: unknown task 'chain'"),
        ({"task_args": {"chain_sum": 3}}, "data.task_args.chain_sum: expected a table of arguments, found 3"),
        (
            {"task_args": {"chain_sum": {"max_termz": 3}}},
            "data.task_args.chain_sum: unknown argument 'max_termz'; did you mean 'max_terms'?",
        ),
        (
            {"task_args": {"chain_sum": {"max_terms": 1}}},
            "data.task_args.chain_sum: the generator refuses {'max_terms': 1}: max_terms must be >= min_terms",
        ),
    ],
)
def test_wrong_settings_are_named(settings, expected):
    with pytest.raises(UserError) as error:
        load_examples(DataConfig(**settings), "train", 2)
    assert str(error.value).startswith(expected)


def test_tasks_that_another_process_would_make_in_another_way_are_refused(monkeypatch):
    program = (
        "import json, sys; from srft.data.tasks import make\n"
        "made = {task: [make(task, {}, 7, 3)[i] for i in range(3)] for task in sys.argv[1:]}\n"
        "print()\n"  # some of them print
        "made = {task: [(x['question'], x['answer']) for x in items] for task, items in made.items()}\n"
        "print(json.dumps(made, default=str))"
    )
    names = sorted({*gym().DATASETS} - {"composite"})  # which needs other tasks named
    made = []
    for seed in ("1", "2"):
        given = {"env": os.environ | {"PYTHONHASHSEED": seed}, "capture_output": True, "text": True}
        made.append(
            json.loads(subprocess.run([sys.executable, "-c", program, *names], **given).stdout.splitlines()[-1])
        )
    differ = {task for task in names if made[0][task] != made[1][task]}
    assert {*BY_HASH} <= differ <= {*BY_HASH, *BY_CHANCE}  # a few items of the latter may be alike
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for task, advice in (("ransom_note", "start with PYTHONHASHSEED=0"), ("knight_swap", "no run could go on with it")):
        with pytest.raises(UserError, match=rf"data.tasks: '{task}' is made in another way .*{advice}"):
            load_examples(DataConfig(tasks=[task]), "train", 3)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load_examples(DataConfig(tasks=["ransom_note"], task_args={}), "train", 3)) == 3
