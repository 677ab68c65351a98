"""One run, `srft train`: evaluate, train, evaluate again, write the report, and lose nothing that was written."""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from srft import checkpoint, pages, report, resume, signals, tracker
from srft.config import Config
from srft.data import Problem, build_prompter, load_examples, load_sides
from srft.errors import UserError, disk_full, first_line
from srft.evaluate import Unscored, evaluate, held_out_problems, measured_on, scorer_for
from srft.evaluation import Evaluation, table
from srft.learn import job as jobs
from srft.learn.objective import refers
from srft.learn.stages import naming, parts_of, stages_of, steps_of
from srft.learn.unused import tell_unused
from srft.likelihood import demonstration_loss
from srft.model import LoadedModel, load_merged, load_model, load_reference, load_tokenizer, merged
from srft.origin import origin
from srft.progress import steps_with_bar
from srft.ranks import Ranks, broadcast
from srft.rewards import build_reward, check_answers
from srft.rundir import ORIGIN, RunLog, create_run_dir, let_go, rewind_run_dir, write_status, write_whole
from srft.settings import load, to_toml
from srft.trainer import Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `before` and `after` are one evaluation where no step was due, None where there was none."""

    directory: Path
    before: Evaluation | None
    after: Evaluation | None
    seconds: float
    report: Path

    def __str__(self) -> str:
        took = f"{int(self.seconds) // 60} min {int(self.seconds) % 60} s · {self.report}"
        return " · ".join([*self.measured(), took])

    def measured(self) -> list[str]:
        """What was measured, from what it was before where that was on the same prompts."""
        after, before = self.after, self.before
        if after is None:
            return ["not evaluated"]
        if before is after or not before.comparable(after):
            before = None
        found = []
        if not math.isnan(after.reward):
            reward, gain = f"{after.reward:.3f}", ""
            if before:
                more, shares = after.reward - before.reward, max(abs(before.reward), abs(after.reward)) <= 1
                reward = f"{before.reward:.3f} → {reward}"
                gain = f"{100 * more:+.1f} points; " if shares else f"{more:+.3f}; "
            found.append(
                f"held-out reward {reward} ({gain}{after.prompts} prompts × {after.samples} samples, seed {after.seed})"
            )
        elif after.loss_tokens:
            losses = [f"{each.loss:.3f}" for each in (before, after) if each]
            perplexities = [f"{each.perplexity:.2f}" for each in (before, after) if each]
            found.append(
                f"held-out loss {' → '.join(losses)} (perplexity {' → '.join(perplexities)}; {after.prompts} prompts)"
            )
        return found


def run(config: Config, ranks: Ranks | None = None, resumed: Path | None = None) -> RunResult:
    """Evaluate, train, evaluate again, write the report; prints the result as its last line.

    Everything is written as soon as it is known, and SIGTERM, Ctrl-C or an error still saves the model as it is, with
    run.checkpoint_every so that --resume goes on from it, and makes the report; of several ranks, the last checkpoint
    is what stays.
    resumed: a checkpoint with the state of its run, which goes on from there in the same directory.
    """
    ranks = ranks or Ranks()
    started = time.perf_counter()
    with signals.listening() if ranks.size == 1 else contextlib.nullcontext():  # torchrun's ranks listen themselves
        ranks.check(config.model)
        done = checkpoint.step_of(resumed) if resumed else 0
        job = prepared(config, ranks, resumed, done)
        directory = opened(job, ranks, resumed, done)
        try:
            under_way = Run(job, ranks, directory, resumed, done)
            page = under_way.whole()
        finally:
            let_go(directory)
        result = RunResult(directory, *under_way.before_and_after(), time.perf_counter() - started, page)
    print(result)
    return result


class Run:
    """A run under way.

    directory    where it writes
    done         steps that are done
    newest       the checkpoint that --resume goes on from, if any
    evaluations  by the steps after which they were made, those before it was resumed too
    """

    def __init__(self, job: "Job", ranks: Ranks, directory: Path, resumed: Path | None, done: int):
        self.trainer, self.held_out = job.trainer, job.held_out
        self.scorer = job.trainer.scorer if job.verified else None
        self.config, self.loaded, self.ranks = job.config, job.trainer.loaded, ranks
        self.directory, self.done, self.newest = directory, done, resumed
        self.log = RunLog(directory, [], silent=not ranks.main)
        self.evaluations = {row["step"]: Evaluation.of(row) for row in broadcast(ranks, lambda: self.log.evaluations())}
        self.writing = threading.RLock()
        ranks.last_words = f"; what was written is in {directory}, no checkpoint yet"
        if resumed:
            self.can_go_on_from(resumed)

    def whole(self) -> Path:
        """Begin, train and finish; what stops that is told, and what was learned until then is saved. The report."""
        try:
            self.begin()
            self.train()
            return self.finish()
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            self.log.close()

    def begin(self) -> None:
        """Say what is run and where, open trackers, evaluate where the run begins."""
        loaded, ranks, config = self.loaded, self.ranks, self.config
        on = f"{ranks.size} × {loaded.device}" if ranks.size > 1 else loaded.device
        where = f"going on after step {self.done} in" if self.newest else "writing to"
        print(f"{parameters(loaded)} on {on}; {where} {self.directory}")
        self.status("running")
        ranks.on_end = self.ended
        if ranks.main:
            self.log.trackers = tracker.open_trackers(config.run, self.directory, dataclasses.asdict(config), self.done)
        self.measure()

    def train(self) -> None:
        """The steps that are left, with checkpoints and evaluations where they are due."""
        settings = self.config.run
        # Closed, so that the bar ends before last words are said.
        with contextlib.closing(steps_with_bar(self.trainer, self.config, self.done)) as steps:
            for self.done, metrics, samples in steps:
                try:
                    self.log.metrics(metrics)
                    self.log.samples(samples)
                finally:
                    signals.release()  # the step is whole
                self.status("running")
                if settings.checkpoint_every and self.done % settings.checkpoint_every == 0:
                    path = self.directory / f"checkpoint-{self.done}"
                    checkpoint.save(self.loaded, path, self.ranks, self.trainer.optimizer.state())
                    self.can_go_on_from(path)
                self.measure()
                self.prune()

    def prune(self) -> None:
        """Delete checkpoints that run.keep_checkpoints does not keep; the best is one of those measured alike."""
        keep = self.config.run.keep_checkpoints
        if keep and self.ranks.main:
            last = self.evaluations[max(self.evaluations)] if self.evaluations else None
            scores = {step: each.score for step, each in self.evaluations.items() if each.comparable(last)}
            checkpoint.prune(self.directory, keep, scores)

    def finish(self) -> Path:
        """Save the model and write the report; returns it."""
        signals.release()
        self.prune()
        final = self.directory / "final"
        if self.loaded.adapters:
            adapter = checkpoint.save(self.loaded, self.directory / "adapter", self.ranks)
            self.ranks.last_words = f"; the adapters are in {adapter}"
            if self.ranks.main:
                checkpoint.save(self.merged(adapter), final)
        else:
            checkpoint.save(self.loaded, final, self.ranks)
        self.status("finished")
        page = broadcast(self.ranks, lambda: report.build(self.directory))
        self.ranks.on_end = None
        return page

    def merged(self, adapter: Path) -> LoadedModel:
        """The model with the adapters, which are saved in `adapter`, added to its weights."""
        if self.ranks.size == 1:
            return merged(self.loaded)
        try:
            return load_merged(self.config.model, adapter, self.loaded)
        except UserError as error:
            advice = f"srft train --model.path {shlex.quote(str(adapter))} --train.steps 0 merges them"
            told = f"{error}; the adapters are whole in {adapter}: once that is put right, {advice}"
            raise UserError(told) from error

    def measure(self) -> None:
        """Evaluate where that is due now, and was not done in the same way before the run was resumed.

        Raises UserError where the first one gives no score; a later one is left out, since a service may be down.
        """
        trainer, config = self.trainer, self.config
        step, steps, every = self.done, config.train.steps, config.eval.every
        due = step in (0, *(stage.last for stage in trainer.stages)) or (every and step % every == 0)
        longest = config.rollout.max_new_tokens
        known = self.evaluations.get(step)
        if not self.held_out or not due or (known and known.on == measured_on(self.held_out, config.eval, longest)):
            return
        if step == 0:
            why = "; no answer is known of them, so that the loss of their demonstrations is measured"
            rolled_out = any("rollouts" in stage.objective.learns_from for stage in trainer.stages)
            samples = f" × {config.eval.samples} samples" if self.scorer else why * rolled_out
            print(f"evaluating {len(self.held_out)} held-out prompts{samples} …", flush=True)
        if self.scorer:
            trainer.refresh_engine()
        loss = demonstration_loss(self.loaded, self.held_out, config.train.token_budget, self.ranks)
        try:
            result = evaluate(trainer.engine, self.held_out, trainer.prompter, self.scorer, config.eval, longest, loss)
        except Unscored as error:
            if step == 0:
                raise
            tqdm.write(f"warning: not evaluated after {step} of {steps} steps: {error}")
            return
        self.evaluations[step] = result
        self.log.evaluation(step, result)
        when = f"held-out after {step} of {steps} steps\n" if steps else ""
        tqdm.write(f"{when}{table(result)}")

    def before_and_after(self) -> tuple[Evaluation | None, Evaluation | None]:
        """The first evaluation and the one after the last step."""
        after = self.evaluations.get(self.config.train.steps) if self.held_out else None
        return (self.evaluations[min(self.evaluations)], after) if after else (None, None)

    def can_go_on_from(self, path: Path) -> None:
        self.newest = path
        self.ranks.last_words = f"; its last checkpoint is {path}: {self.going_on} goes on from it"

    @property
    def going_on(self) -> str:
        """The command that goes on with it."""
        return f"srft train --resume {shlex.quote(str(self.directory))}"

    def status(self, state: str, reason: str = "", by_any: bool = False) -> None:
        command = self.going_on if self.newest and state != "finished" else ""
        with self.writing:
            if self.ranks.main or by_any:
                write_status(self.directory, state, self.done, self.config.train.steps, reason, command)

    def ended(self, message: str) -> None:
        """Write the status of a run of several ranks that another one, or a signal, has ended: the last that is.

        Called on the rank that tells of it.
        """
        self.writing.acquire(timeout=5)
        told = message.removeprefix("srft: ").removeprefix("error: ")
        by_signal = told.startswith(("stopped by a signal", "interrupted"))
        self.status(*("interrupted", "a signal") if by_signal else ("failed", told), by_any=True)

    def stop(self, error: BaseException) -> None:
        """Save what was learned until the error, or the signal, and say what there is."""
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = (str(error) or "Ctrl-C") if interrupted else described(error)
        state = "interrupted" if interrupted else "failed"
        if self.ranks.size > 1:  # the others cannot be asked for their part of the model
            with contextlib.suppress(OSError):
                self.status(state, reason)
            return
        how = f"interrupted by {reason}" if interrupted else "stopped by an error"
        lines = [f"{how} after step {self.done} of {self.config.train.steps}; what was written stays:"]
        lines += [f"  {line}" for line in self.saved()]
        self.newest = checkpoint.newest_with_state(self.directory)
        if self.newest:
            lines.append(f"  {self.newest}, from which the run goes on: {self.going_on}")
        try:
            self.status(state, reason)
            lines.append(f"  the report in {report.build(self.directory)}")
        except Exception as failure:  # must not hide what stopped the run
            lines.append(f"  {self.directory} (no report: {failure}{disk_full(failure)})")
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("\n".join(lines), file=sys.stderr)

    def saved(self) -> Iterator[str]:
        """Save what an interrupted run has learned, as far as that works; says what there is.

        With the state for --resume where checkpoints are on, and the error did not come in the middle of an update.
        """
        model = next((each for name in ("final", "adapter") if (each := self.directory / name).exists()), None)
        if self.done and model is None:
            places = [(self.directory / f"interrupted-{self.done}", None)]
            if self.config.run.checkpoint_every and not signals.held():
                places.insert(0, (self.directory / f"checkpoint-{self.done}", self.trainer.optimizer.state()))
            for model, state in places:
                try:
                    if not model.exists():  # the checkpoint that was due, or that the run was resumed from
                        checkpoint.save(self.loaded, model, None, state)
                    break
                except Exception as error:  # must not hide what stopped the run; the model alone may still have room
                    yield f"the model could not be saved: {error}"
        if model is not None and model.exists():
            yield f"the model in {model} (srft eval --checkpoint {shlex.quote(str(model))})"


class Job(NamedTuple):
    """What a run works with.

    config     the run's, with the steps of all its stages
    written    the same as config.toml has it, from which a resumed run makes the same stages
    held_out   what is measured on
    verified   whether their completions can be scored; else the loss of their demonstrations is all there is
    data       what tells the examples from others (resume.py)
    """

    config: Config
    written: Config
    trainer: Trainer
    held_out: list[Problem]
    verified: bool
    data: dict[str, Any]


def prepared(config: Config, ranks: Ranks, resumed: Path | None, done: int) -> Job:
    """The trainer as it was when `resumed` was saved, and what else a run needs.

    Raises UserError for all that is wrong with the settings: what can be known without the model before it is loaded.
    """
    if resumed:
        began = load(str(resumed.parent / "config.toml"))
        resume.check_settings(began, config)
    check_place(config)
    pages.require_packages("report.html")  # a run of hours must not fail on its last page
    tracker.require_packages(config.run)
    parts = parts_of(config)
    tell_unused(config, parts)
    scorer = build_reward(config.reward, config.data)
    if config.eval.prompts:
        examples, held_out = load_sides(config.data, config.data.size, config.eval.prompts)
    else:
        examples, held_out = load_examples(config.data, "train", config.data.size), []
    supervised = not any("rollouts" in part.objective.learns_from for part in parts)
    drawn = examples if config.train.steps or config.train.epochs else []

    def check() -> None:
        for part in parts:
            with naming(part.number):
                jobs.check(part.objective, part.config, drawn)

    if supervised:  # what it learns from comes before what it is measured by
        check()
    held_out_scorer = scorer_for(scorer, config, held_out)
    if not supervised:
        check_answers(scorer, config.data, [], examples)
        check()
    if supervised:
        examples = jobs.with_demonstrations(examples)
    data = resume.fingerprint(examples, held_out, config.data)
    if any(each != data for each in ranks.gather(data)):
        given = (
            "give all of them the same files" if config.data.train_file else "data.tasks makes others in each process"
        )
        raise UserError(f"torchrun: the ranks have not the same examples; {given}")
    if resumed:
        resume.check_data(resumed.parent, began.data, data)
    model = dataclasses.replace(config.model, path=str(resumed)) if resumed else config.model
    tokenizer, positions = load_tokenizer(model)
    if config.model.reference and any(refers(part.objective) for part in parts):
        of_reference = dataclasses.replace(config.model, path=config.model.reference)
        positions = min(positions, load_tokenizer(of_reference, "model.reference")[1])
    prompter = build_prompter(tokenizer, config.data)
    problems = []
    for part in parts:
        with naming(part.number):
            problems.append(jobs.training_problems(part.config, prompter, examples, part.objective, positions))
    stages = stages_of(config, parts, problems)
    for stage in stages:
        jobs.check_amounts(stage.config, len(stage.problems), f"stage {stage.number}: " if parts[1:] else "")
    if resumed:
        before = steps_of(began, parts_of(began), list(map(len, problems)))
        resume.check_stages(resumed, before, [stage.config.train.steps for stage in stages], done)
    measured = held_out_problems(config, prompter, held_out, held_out_scorer, positions, parts)
    loaded = load_model(model, tokenizer=tokenizer)
    left = [stage.objective for stage in stages if stage.last > done]
    reference = load_reference(config.model, loaded) if any(map(refers, left)) else None
    trainer = Trainer(stages, loaded, prompter, ranks.scorer(scorer), done=done, ranks=ranks, reference=reference)
    if resumed:
        checkpoint.read_state(trainer.optimizer.state(), resumed / checkpoint.STATE, ranks)
        trainer.optimizer.write_back()
        trainer.stale = True
    total = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=stages[-1].last, epochs=0.0))
    written = config if config.train.stages else total
    return Job(total, written, trainer, measured, held_out_scorer is not None, data)


def check_place(config: Config) -> None:
    """Raise UserError where run.overwrite would move the model that adapters name by its path."""
    model, directory = (Path(each).expanduser().resolve() for each in (config.model.path, config.run.dir))
    if config.model.lora_rank and config.run.overwrite and model.exists() and model.is_relative_to(directory):
        raise UserError(
            f"model.path {config.model.path!r} lies in run.dir, where run.overwrite moves it, and adapters name their "
            "model by its path; take another run.dir"
        )


def opened(job: Job, ranks: Ranks, resumed: Path | None, done: int) -> Path:
    """The run's directory with its settings: a new one, or that of `resumed` as it was after `done` steps."""
    config, settings = job.config, to_toml(job.written)
    if resumed:
        directory = resumed.parent
        broadcast(ranks, lambda: rewind_run_dir(directory, done, settings))
    else:
        directory = broadcast(ranks, lambda: create_run_dir(config.run))
    try:
        if ranks.main:
            if not (directory / ORIGIN).exists():  # that of the run's beginning
                write_whole(directory / ORIGIN, json.dumps(origin(job.trainer.loaded), indent=1))
            write_whole(directory / resume.DATA, json.dumps(job.data, indent=1))
            write_whole(directory / "config.toml", settings)
    except BaseException:
        let_go(directory)
        raise
    return directory


def described(error: BaseException) -> str:
    """What stopped the run, in a line."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def parameters(loaded: LoadedModel) -> str:
    count = sum(p.numel() for p in loaded.model.parameters())
    of_rows = "" if loaded.rows.packed else f", its sequences padded and not packed ({loaded.rows.reason}),"
    dtype = str(loaded.dtype).removeprefix("torch.")
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    adapters = f", {trained / 1e6:.2f} M of them adapters that are trained" if loaded.adapters else ""
    return f"{type(loaded.model).__name__} with {count / 1e6:.1f} M parameters in {dtype}{adapters}{of_rows}"
