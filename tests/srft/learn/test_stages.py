"""The stages of a run: whose settings hold when, how many steps each has, and what a wrong one is told."""

import pytest
import torch
from safetensors.torch import load_file

from srft import run as run_module
from srft.checkpoint import read_state, resumable
from srft.errors import UserError
from srft.learn.stages import parts_of, stage_at, stages_of, steps_of
from srft.ranks import Ranks
from srft.run import run
from srft.settings import load, to_toml
from srft.trainer import Trainer
from tests.srft.test_run import lines_of, small_run

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


STAGED = ("--train.stages", "sft", "grpo", "--train.steps", "6", "--run.checkpoint_every", "1", "--data.size", "40")


def stopped_before(step: int, monkeypatch) -> None:
    def failing(self, number, whole=Trainer.step):
        if number == step:
            raise RuntimeError("stopped here")
        return whole(self, number)

    monkeypatch.setattr(Trainer, "step", failing)


@pytest.mark.parametrize("moments", ["fresh", "kept"])
def test_a_run_of_two_stages_goes_on_in_either(tiny_dir, tmp_path, monkeypatch, moments, capsys):
    options = [*STAGED, "--train.stage_moments", moments, "--eval.prompts", "0"]
    run(small_run(tiny_dir, tmp_path / "whole", *options))
    told = "".join(capsys.readouterr())
    assert "stage 1 of 2: sft, steps 1 to 3\n" in told
    assert f"stage 2 of 2: grpo, steps 4 to 6, AdamW's moments {moments}\n" in told
    whole = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    monkeypatch.setattr(run_module.report, "build", lambda directory: directory)  # it takes most of the time
    for done in (2, 3, 4):  # in the first stage, between them, in the second
        directory = tmp_path / f"stopped-{done}"
        with monkeypatch.context() as patch:
            stopped_before(done + 1, patch)
            with pytest.raises(RuntimeError, match="stopped here"):
                run(small_run(tiny_dir, directory, *options))
        run(load(str(directory / "config.toml")), resumed=directory / f"checkpoint-{done}")
        again = load_file(directory / "final" / "model.safetensors")
        assert all(torch.equal(again[name], whole[name]) for name in whole)
        lines = lines_of(directory / "metrics.jsonl")
        assert [(line["step"], line["stage"]) for line in lines] == list(zip(range(1, 7), [1, 1, 1, 2, 2, 2]))


def test_the_moments_of_a_stage_are_fresh_or_kept(tiny_dir, tmp_path):
    updates = {}
    for moments in ("fresh", "kept"):
        directory = tmp_path / moments
        run(small_run(tiny_dir, directory, *STAGED, "--train.stage_moments", moments, "--train.steps", "5"))
        state = {"step.model.norm.weight": torch.zeros(())}
        read_state(state, directory / "checkpoint-5" / "state", Ranks())
        updates[moments] = int(state["step.model.norm.weight"])
    assert updates == {"fresh": 2, "kept": 5}


def test_a_stage_has_its_own_schedule_and_order(tiny_dir, tmp_path):
    run(small_run(tiny_dir, tmp_path / "run", *STAGED, "--train.lr", "1e-3", "--train.warmup_steps", "1"))
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4] * 2)


def test_steps_that_are_done_stay_those_of_their_stage(tiny_dir, tmp_path):
    directory = tmp_path / "run"
    run(small_run(tiny_dir, directory, *STAGED, "--train.steps", "4"))
    settings, newest = directory / "config.toml", directory / "checkpoint-4"
    with pytest.raises(UserError, match=r"checkpoint-4: the run has stages of 2 \+ 2 steps, of which 4 are done; now "):
        run(load(str(settings), ["--train.steps", "8"]), resumed=newest)
    with pytest.raises(UserError, match=r"another run: train\.stages was"):
        run(load(str(settings), ["--train.stages", "grpo", "sft"]), resumed=newest)


def test_a_run_of_two_stages_is_measured_between_them_and_its_report_shows_both(tiny_dir, tmp_path):
    run(small_run(tiny_dir, tmp_path / "run", *STAGED, "--train.steps", "4"))
    assert [line["step"] for line in lines_of(tmp_path / "run" / "evaluation.jsonl")] == [0, 2, 4]
    page = (tmp_path / "run" / "report.html").read_text()
    rows = page.partition("<h2>Stages</h2>")[2].partition("</table>")[0].split("<tr>")[2:]
    assert len(rows) == 2 and "1 · sft</td><td>1–2</td>" in rows[0] and "2 · grpo</td><td>3–4</td>" in rows[1]
    assert all(f"{0:.3f} → <b>{0:.3f}</b>" in row for row in rows)
    assert "stage of train.stages, from 1" in page


def test_the_report_of_a_stage_that_was_not_measured_has_a_dash(tiny_dir, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stopped_before(6, patch)
        with pytest.raises(RuntimeError, match="stopped here"):
            run(small_run(tiny_dir, tmp_path / "run", *STAGED))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "0.000 → <b>–</b>" in page.partition("<h2>Stages</h2>")[2].partition("</table>")[0]
    settings = load(str(tmp_path / "run" / "config.toml"), ["--eval.samples", "3"])
    run(settings, resumed=resumable(str(tmp_path / "run")))
    assert "– → <b>0.000</b>" in (tmp_path / "run" / "report.html").read_text()


def test_supervised_steps_are_at_temperature_1(tiny_dir, tmp_path):
    losses = {}
    for temperature in ("1.0", "0.5"):
        run(small_run(tiny_dir, tmp_path / temperature, *STAGED, "--rollout.temperature", temperature))
        losses[temperature] = [line["loss"] for line in lines_of(tmp_path / temperature / "metrics.jsonl")][:3]
    assert losses["1.0"] == losses["0.5"]


def test_a_first_step_that_did_not_come_to_its_end_leaves_the_moments(tiny_dir, tmp_path, monkeypatch):
    """The run may go on with a longer first stage, which needs them."""

    def failing(self, *arguments, learn=Trainer._learn):
        if self.stage.number == 2:
            raise RuntimeError("stopped here")
        return learn(self, *arguments)

    monkeypatch.setattr(Trainer, "_learn", failing)
    options = [*STAGED, "--run.checkpoint_every", "99"]
    with pytest.raises(RuntimeError, match="stopped here"):
        run(small_run(tiny_dir, tmp_path / "run", *options))
    state = {"step.model.norm.weight": torch.zeros(())}
    read_state(state, tmp_path / "run" / "checkpoint-3" / "state", Ranks())
    assert int(state["step.model.norm.weight"]) == 3
