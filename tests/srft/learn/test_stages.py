"""The stages of a run: whose settings hold when, how many steps each has, and what a wrong one is told."""

import pytest

from srft.errors import UserError
from srft.learn.stages import parts_of, stage_at, stages_of, steps_of
from srft.settings import load, to_toml

SFT, GRPO = '{loss={preset="sft"}}', '{name="rl", loss={preset="grpo"}, train={lr=1e-6}}'


def config(*overrides: str, **kwargs):
    return load(None, list(overrides), **kwargs)


def steps(*overrides: str, prompts: int = 100) -> list[int]:
    settings = config(*overrides)
    parts = parts_of(settings)
    return steps_of(settings, parts, [prompts] * len(parts))


def test_a_stage_has_the_runs_settings_and_its_own():
    first, second = parts_of(config("--train.stages", SFT, GRPO, "--train.lr", "1e-4", "--loss.average", "sequence"))
    assert (first.name, second.name) == ("sft", "rl")
    assert (first.config.loss.preset, second.config.loss.preset) == ("sft", "grpo")
    assert (first.config.train.lr, second.config.train.lr) == (1e-4, 1e-6)
    assert first.config.loss.average == second.config.loss.average == "sequence"


def test_recipes_are_stages_and_are_written_out(tmp_path):
    settings = config("--train.stages", "sft", "grpo")
    assert [each["name"] for each in settings.train.stages] == ["sft", "grpo"]
    assert settings.train.stages[1]["loss"]["average"] == "sequence"
    (tmp_path / "again.toml").write_text(to_toml(settings))
    assert load(str(tmp_path / "again.toml")) == settings == config(recipes=["sft_grpo"])


def test_a_table_may_begin_with_a_recipe():
    (only,) = parts_of(config("--train.stages", '{recipe="grpo", loss={average="token"}}'))
    assert only.name == "grpo" and only.config.loss.preset == "grpo" and only.config.loss.average == "token"


def test_a_file_may_have_tables(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[[train.stages]]\nrecipe = "sft"\ntrain.steps = 3\n[[train.stages]]\nloss.preset = "grpo"\n')
    settings = load(str(file), ["--train.steps", "10"])
    assert [part.name for part in parts_of(settings)] == ["sft", "grpo"]
    assert steps_of(settings, parts_of(settings), [9, 9]) == [3, 7]
    (tmp_path / "again.toml").write_text(to_toml(settings))
    assert load(str(tmp_path / "again.toml")) == settings


def test_steps_are_shared():
    assert steps() == [16]
    assert steps("--train.stages", SFT, GRPO) == [8, 8]
    assert steps("--train.stages", SFT, GRPO, SFT, "--train.steps", "17") == [6, 6, 5]
    assert steps("--train.stages", '{loss={preset="sft"}, train={steps=5}}', GRPO) == [5, 11]
    counted = '{loss={preset="sft"}, train={steps=50}}', '{loss={preset="grpo"}, train={epochs=2}}'
    assert steps("--train.stages", *counted, "--train.prompts_per_step", "10") == [50, 20]
    assert steps("--train.stages", SFT, GRPO, "--train.epochs", "3", "--train.prompts_per_step", "10") == [15, 15]
    assert steps("--train.stages", SFT, GRPO, "--train.steps", "0") == [0, 0]


def test_stages_follow_one_another():
    settings = config("--train.stages", SFT, GRPO, "--train.steps", "5")
    stages = stages_of(settings, parts_of(settings), [[], []])
    assert [(each.number, each.before, each.last, each.config.train.steps) for each in stages] == [
        (1, 0, 3, 3),
        (2, 3, 5, 2),
    ]
    assert [stage_at(stages, step).number for step in range(7)] == [1, 1, 1, 1, 2, 2, 2]
    assert len({stage.order for stage in stages}) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("grop", r"train.stages\[1\]: recipe 'grop' is not known; did you mean 'grpo'"),
        ("sft_grpo", r"train.stages\[1\]: recipe 'sft_grpo' has stages itself"),
        ("gsm_symbolic", r"train.stages\[1\]: data.tasks is the same in all of a run"),
        ('{loss={pre="sft"}}', r"train.stages\[1\]: unknown key 'loss.pre'; did you mean 'loss.preset'"),
        ('{los={preset="sft"}}', r"train.stages\[1\]: unknown section \[los\]"),
        ('{loss={average="tokens"}}', r"train.stages\[1\]: loss.average: expected one of token"),
        ('{train={lr="fast"}}', r"train.stages\[1\]: train.lr: expected a number, found 'fast'"),
        ("{train={seed=1}}", r"train.stages\[1\]: train.seed is the same in all of a run"),
        ("{model={path='x'}}", r"train.stages\[1\]: model.path is the same in all of a run"),
        ("{loss='sft'}", r"train.stages\[1\]: loss: expected a table"),
        ("{name=3, loss={preset='sft'}}", r"train.stages\[1\]: name: expected text, found 3"),
        ("{recipe=sft}", r"train.stages\[1\]: not a table in TOML, whose texts are in quotes"),
        ("{loss={preset='sftt'}}", r"train.stages\[1\]: loss.preset: expected one of .*did you mean 'sft'"),
        ("{loss={preset=3}}", r"train.stages\[1\]: loss.preset: expected text, found 3"),
        ("{recipe='grpo', loss={options={foo=1}}}", r"train.stages\[1\]: loss.options.foo: unknown option"),
        ("{train={steps=3, epochs=2}}", r"train.stages\[1\]: train.steps and train.epochs: give one of them"),
        ("{train={steps='a'}}", r"train.stages\[1\]: train.steps: expected a whole number, found 'a'"),
    ],
)
def test_what_is_no_stage_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        parts_of(config("--train.stages", entry))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.steps", "1"], "train.steps 1 leaves 1 for 2 of the 2 stages"),
        (["--train.stages", "{train={steps=16}}", GRPO], "train.steps 16 leaves 0 for 1 of the 2 stages"),
        (
            ["--train.stages", "{train={steps=0}}", GRPO],
            r"train.stages\[1\]: train.steps: a stage has one step at least",
        ),
    ],
)
def test_a_stage_without_steps_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        steps("--train.stages", SFT, GRPO, *overrides)


@pytest.mark.parametrize("name", ["123", "off", "true", "~", "null", "# c", "a: b", "[x]", "1_000"])
def test_a_stage_may_have_any_name(name):
    (part,) = parts_of(config("--train.stages", f'{{recipe = "sft", name = "{name}"}}'))
    assert part.name == name


def test_no_epochs_are_no_number_of_steps():
    assert steps("--train.stages", "{recipe='sft', train={epochs=0}}", GRPO, "--train.steps", "6") == [3, 3]


def test_what_every_stage_sets_is_not_taken_from_the_command_line():
    with pytest.raises(
        UserError, match=r"--loss.average: each of train.stages \(sft, grpo\) has its own; write it there"
    ):
        config("--train.stages", "sft", "grpo", "--loss.average", "token")
    assert config("--train.stages", "sft", GRPO, "--loss.average", "sequence").loss.average == "sequence"
    both = "{rollout={max_new_tokens=9}}"
    assert config("--train.stages", both, both, "--rollout.max_new_tokens", "5").rollout.max_new_tokens == 5
