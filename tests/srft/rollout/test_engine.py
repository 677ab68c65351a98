"""What a trainer and a run tell an engine that has weights of its own."""

import copy
from dataclasses import replace

import pytest

from srft import run as run_module
from srft.rollout import Engine
from srft.rollout.transformers_engine import TransformersEngine
from srft.run import run
from srft.trainer import Trainer
from tests.srft.test_run import lines_of, small_run
from tests.srft.test_trainer import examples, fresh, make


class Copying(Engine):
    """Generates with a copy of the model, as an engine in another process would; writes down what it is told."""

    needs_model = False

    def __init__(self, loaded):
        self.model = copy.deepcopy(loaded.model)
        self.engine, self.told = TransformersEngine(replace(loaded, model=self.model)), []

    def generate(self, prompts, samples, *, batch_size, **settings):
        self.told.append(f"generate {batch_size}")
        return self.engine.generate(prompts, samples, batch_size=batch_size, **settings)

    def refresh(self, weights):
        self.told.append("refresh")
        self.model.load_state_dict(dict(weights))  # strict

    def release(self):
        self.told.append("release")


class Deaf(Copying):
    def refresh(self, weights):
        pass


STEP = ["generate 5", "release"]


def steps(engine, tie: bool) -> tuple[list[float], list[str]]:
    loaded = fresh(tie_word_embeddings=tie)
    settings = "--train.lr=0.1", "--train.updates_per_rollout=2", "--rollout.batch_size=5"
    trainer = make(loaded, *settings, engine=engine and engine(loaded))
    losses = [trainer.step(number)[0]["loss"] for number in (1, 2, 3)]
    return losses, getattr(trainer.engine, "told", [])


@pytest.mark.parametrize("tie", [True, False])
def test_an_engine_with_weights_of_its_own_samples_with_those_of_the_last_update(tie):
    expected, _ = steps(None, tie)
    assert steps(Copying, tie) == (expected, [*STEP, "refresh", *STEP, "refresh", *STEP])
    assert steps(Deaf, tie)[0] != expected


def test_an_engine_is_told_only_of_what_has_changed(tiny):
    trainer = make(tiny, "--loss.preset=sft", engine=Copying(tiny))
    trainer.step(1)
    trainer.step(2)
    assert trainer.engine.told == [] and trainer.stale  # nothing is generated
    trainer.refresh_engine()
    trainer.refresh_engine()
    assert trainer.engine.told == ["refresh"]
    trainer.optimizer.step = lambda number: {"skipped_updates": 1.0}
    trainer.step(3)
    assert not trainer.stale
    trainer = make(tiny, data=examples(demonstrations=False), reward=unscored, engine=Copying(tiny))
    trainer.step(1)
    assert not trainer.stale  # there were no microbatches


def unscored(prompts, completions, **columns):
    return [None] * len(completions)


def interrupted_in_step_2(self, number, step=Trainer.step):
    if number == 2:
        raise KeyboardInterrupt
    return step(self, number)


def test_a_run_has_one_engine_and_resumes_with_the_weights_of_the_checkpoint(tiny_dir, tmp_path, monkeypatch):
    def once(name, loaded):
        engines.append(Copying(loaded))
        return engines[-1]

    settings = ["--rollout.batch_size=5", "--eval.batch_size=3", "--run.checkpoint_every=1", "--train.lr=0.1"]
    plain = run(small_run(tiny_dir, tmp_path / "plain", *settings))
    monkeypatch.setattr("srft.trainer.build_engine", once)
    monkeypatch.setattr(run_module.report, "build", lambda path: path / "report.html")
    engines: list[Copying] = []
    evaluated = ["generate 3", "release"]
    config = small_run(tiny_dir, tmp_path / "run", *settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted_in_step_2)
        run(config)
    assert [each.told for each in engines] == [[*evaluated, *STEP]]
    resumed = run(config, resumed=tmp_path / "run" / "checkpoint-1")
    assert engines[1].told == ["refresh", *STEP, "refresh", *evaluated]
    assert resumed.after == plain.after
    losses = [[line["loss"] for line in lines_of(tmp_path / name / "metrics.jsonl")] for name in ("plain", "run")]
    assert losses[0] == losses[1]
