"""The training loop. `run(config)` is `srft train`; `Trainer.step` is one step of it:

1. sample prompts
2. roll out: G completions of each, from the model as it is now
3. score them, and the demonstrations in the same way
4. advantages over the augmented group: a prompt's rollouts and its demonstration
5. pack rollouts and demonstrations into microbatches under a token budget
6. per microbatch: hidden states of the backbone, ONE fused loss over both kinds of tokens, backward
7. clip and update

L = L_demo + L_roll: each part is averaged over its own tokens across the whole step (`loss.average`).
What an objective learns from follows from its kind: SRFT from both, PolicyGradient from rollouts, CrossEntropy from
demonstrations (and then nothing is generated).
"""

import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import srft_kernels as sk
from srft import checkpoint, report
from srft.advantages import group_advantages
from srft.config import Config, to_toml
from srft.data import Example, load_examples
from srft.errors import UserError
from srft.evaluate import Evaluation, evaluate, table
from srft.metrics import RunLog, create_run_dir, mean, peak_memory_mb, rewind_run_dir, std
from srft.model import LoadedModel, head_of, hidden_states, load_model
from srft.objective import build_objective
from srft.optim import Optimizer
from srft.packing import Microbatch, Sequence, pack
from srft.prompts import Prompter, build_prompter
from srft.ranks import Ranks, broadcast
from srft.rewards import Scorer, build_reward, check_answers
from srft.rollout import Engine, Rollout, build_engine
from srft.sharing import sharing_limit
from srft_kernels.objectives.objective import objective_of


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `before` and `after` are the same prompts and seed, one evaluation where no step was due."""

    directory: Path
    before: Evaluation
    after: Evaluation
    seconds: float
    report: Path

    def __str__(self) -> str:
        before, after, minutes = self.before, self.after, int(self.seconds) // 60
        reward, gain = f"{after.reward:.3f}", ""
        if before is not after:
            reward, gain = f"{before.reward:.3f} → {reward}", f"{100 * (after.reward - before.reward):+.1f} points; "
        return (
            f"held-out reward {reward} ({gain}{after.prompts} prompts × "
            f"{after.samples} samples, seed {after.seed}) · {minutes} min {int(self.seconds) % 60} s · {self.report}"
        )


@dataclass(frozen=True)
class Problem:
    """An example as token ids."""

    example: Example
    prompt: list[int]
    demonstration: list[int] | None


def run(config: Config, ranks: Ranks | None = None, resumed: Path | None = None) -> RunResult:
    """Evaluate, train, evaluate again, write the report; prints the result as its last line.

    Everything is written as soon as it is known, and an interruption or an error still saves the model as it is
    (`interrupted-<step>`) and makes the report; of several ranks, the last checkpoint is what stays.
    resumed: a checkpoint with the state of its run, which goes on from there in the same directory.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks()
    ranks.check(config.model)
    done = checkpoint.step_of(resumed) if resumed else 0
    if done > config.train.steps:
        raise UserError(f"--resume {resumed}: {done} steps are done; train.steps {config.train.steps} is fewer")
    report.require_packages()  # a run of hours must not fail on its last page
    objective = build_objective(config.loss)
    scorer = ranks.scorer(alone := build_reward(config.reward, config.data))
    needed = config.train.steps * config.train.prompts_per_step
    examples = load_examples(config.data, "train", config.data.size)[:needed]
    held_out = load_examples(config.data, "eval", config.eval.prompts)
    check_answers(alone, config.data, held_out, examples if "rollouts" in objective.learns_from else [])
    loaded = load_model(dataclasses.replace(config.model, path=str(resumed)) if resumed else config.model)
    prompter = build_prompter(loaded.tokenizer, config.data)
    trainer = Trainer(config, loaded, prompter, scorer, examples, objective, ranks=ranks)
    eval_engine = ranks.engine(build_engine(config.rollout.engine, loaded, config.eval.batch_size))

    if resumed:
        directory = resumed.parent
        checkpoint.read_state(trainer.optimizer.state(), resumed / checkpoint.STATE, ranks)
        trainer.optimizer.refresh()
        broadcast(ranks, lambda: rewind_run_dir(directory, done, to_toml(config)))
    else:
        directory = broadcast(ranks, lambda: create_run_dir(config.run))
    if ranks.main:
        (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(directory, config.run.tensorboard, done=done, silent=not ranks.main)
    on = f"{ranks.size} × {loaded.device}" if ranks.size > 1 else loaded.device
    print(f"{parameters(loaded)} on {on}; {f'going on after step {done} in' if resumed else 'writing to'} {directory}")
    last = f"; its last checkpoint is {{}}: srft train --resume {directory} goes on from it"
    ranks.last_words = last.format(resumed) if resumed else f"; what was written is in {directory}, no checkpoint yet"
    evaluations = {row["step"]: Evaluation.of(row) for row in broadcast(ranks, lambda: log.evaluations())}

    def measure(step: int) -> None:
        """Evaluate where that is due after `step`, and was not done before the run was resumed."""
        every = config.eval.every
        if step in evaluations or not (step in (0, config.train.steps) or (every and step % every == 0)):
            return
        if step == 0:
            prompts = f"{len(held_out)} held-out prompts × {config.eval.samples} samples"
            print(f"evaluating {prompts} …", flush=True)
        result = evaluate(eval_engine, held_out, prompter, scorer, config.eval, config.rollout.max_new_tokens)
        evaluations[step] = result
        log.evaluation(step, result)
        when = f"held-out after {step} of {config.train.steps} steps\n" if config.train.steps else ""
        tqdm.write(f"{when}{table(result)}")

    try:
        measure(done)
        steps = steps_with_bar(trainer, log, config, done)
        for done in steps:
            if config.run.checkpoint_every and done % config.run.checkpoint_every == 0:
                path = directory / f"checkpoint-{done}"
                checkpoint.save(loaded, path, ranks, trainer.optimizer.state())
                ranks.last_words = last.format(path)
            measure(done)
        checkpoint.save(loaded, directory / "final", ranks)
        page = broadcast(ranks, lambda: report.build(directory))
    except BaseException as error:
        if ranks.size > 1:  # the others cannot be asked for their part of the model
            raise
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped by an error"
        print(f"{reason} after step {done} of {config.train.steps}; what was written stays:", file=sys.stderr)
        for line in rescued(loaded, directory, done):
            print(f"  {line}", file=sys.stderr)
        raise
    finally:
        log.close()
    before, after = evaluations[min(evaluations)], evaluations[config.train.steps]
    result = RunResult(directory, before, after, time.perf_counter() - started, page)
    print(result)
    return result


def rescued(loaded: LoadedModel, directory: Path, done: int) -> Iterator[str]:
    """Save the model of an interrupted run and make its report, as far as that works; says what there is."""
    model = directory / "final"
    if done and not model.exists():
        model = directory / f"interrupted-{done}"
        try:
            checkpoint.save(loaded, model)
        except Exception as error:  # must not hide what stopped the run
            yield f"the model could not be saved: {error}"
    if model.exists():
        yield f"the model in {model} (srft eval --checkpoint {model})"
    try:
        yield f"the report in {report.build(directory)}"
    except Exception as error:
        yield f"{directory} (no report: {error})"


def steps_with_bar(trainer: "Trainer", log: RunLog, config: Config, done: int = 0) -> Iterator[int]:
    """Do the steps after `done`, log each, show the bar; yields the number of steps done.

    UserError where no update can be taken.
    """
    steps = config.train.steps
    skipped, patience = 0, min(5, steps)
    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=not steps) as bar:
        for number in range(done + 1, steps + 1):
            metrics, samples = trainer.step(number)
            log.metrics(metrics)
            log.samples(samples)
            shown = {"reward": "reward_mean", "entropy": "rollout_entropy", "loss": "loss"}
            words = [f"{name} {metrics[key]:.3f}" for name, key in shown.items() if key in metrics]
            bar.set_postfix_str(", ".join([*words, f"{metrics['tokens_per_second']:.0f} tokens/s"]), refresh=False)
            bar.update()
            skipped = skipped + 1 if metrics["skipped_updates"] == 1 else 0
            if skipped == patience:
                raise UserError(
                    f"training diverged: in {skipped} steps in a row no gradient was finite, so no update was taken; "
                    "lower train.lr, or take model.dtype float32"
                )
            yield number


def chosen(sequences: list[Sequence], threshold: float) -> list[Sequence]:
    """HPT's switch (arXiv 2509.04419) for one prompt: its rollouts if enough are rewarded, else its demonstration."""
    is_demo = torch.tensor([sequence.is_demo for sequence in sequences])
    rewards = torch.tensor([sequence.reward for sequence in sequences])
    one_prompt, each = torch.zeros(len(sequences)), torch.arange(len(sequences))
    learns = sk.hpt_switch(is_demo, rewards, one_prompt, each, threshold)  # as if a sequence were one token
    return [sequence for sequence, kept in zip(sequences, learns.tolist()) if kept]


def parameters(loaded: LoadedModel) -> str:
    count = sum(p.numel() for p in loaded.model.parameters())
    return f"{type(loaded.model).__name__} with {count / 1e6:.1f} M parameters in {str(loaded.dtype).split('.')[-1]}"


class Trainer:
    """Model, optimizer and data of a run. `loss_function` has the signature of `srft_kernels.linear_loss`."""

    def __init__(
        self,
        config: Config,
        loaded: LoadedModel,
        prompter: Prompter,
        scorer: Scorer,
        examples: list[Example],
        objective: Any = None,
        *,
        engine: Engine | None = None,
        loss_function: Callable[..., sk.LossOutput] = sk.linear_loss,
        ranks: Ranks | None = None,
    ):
        self.config, self.loaded, self.prompter, self.scorer = config, loaded, prompter, scorer
        self.ranks = ranks or Ranks()
        self.objective = build_objective(config.loss) if objective is None else objective_of(objective)
        self.learns_from_rollouts = "rollouts" in self.objective.learns_from
        self.learns_from_demos = "demonstrations" in self.objective.learns_from
        engine = engine or build_engine(config.rollout.engine, loaded, config.rollout.batch_size)
        self.engine = self.ranks.engine(engine)
        self.loss_function = loss_function
        self.share_up_to = sharing_limit(loaded.model) if config.train.share_prompts else 0
        self.ranks.shard(loaded)  # after the trial, which may fail within a forward, and before the optimizer
        self.optimizer = Optimizer(loaded.model, config.train)
        # Encoding everything now finds a prompt that is too long before any time is spent.
        self.problems = [self._problem(example) for example in examples]
        if not self.learns_from_rollouts and examples and not any(p.demonstration for p in self.problems):
            raise UserError(f"loss.preset {config.loss.preset!r} learns from demonstrations, but no example has one")
        self._check_lengths()

    def step(self, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `number`, from 1. Returns the line for metrics.jsonl and some generations."""
        started = time.perf_counter()
        # Dropout follows from the step and the rank alone, so that a resumed run goes on as if it had not stopped.
        torch.manual_seed(random.Random(f"{self.config.train.seed}/{number}/{self.ranks.rank}").getrandbits(63))
        problems = self._draw(number)
        groups = self._roll_out(problems, number) if self.learns_from_rollouts else [[] for _ in problems]
        sequences, samples, metrics = self._score(problems, groups)
        generated = time.perf_counter()
        train = self.config.train
        microbatches = pack(
            sequences,
            token_budget=train.token_budget,
            average=self.config.loss.average,
            max_length=self.config.rollout.max_new_tokens,
            pad_id=self.loaded.pad_id,
            device=self.loaded.device,
            share_up_to=self.share_up_to,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )
        metrics |= self._learn(microbatches, number)
        ended = time.perf_counter()
        lengths = {kind: sum(len(s.completion) for s in sequences if s.is_demo == kind) for kind in (True, False)}
        padded = sum(m.input_ids.numel() for m in microbatches)
        of_ranks = self.ranks.gather((padded, len(microbatches), peak_memory_mb(self.loaded.device)))
        padded, count, peak = zip(*of_ranks)
        metrics |= {
            "demo_tokens": lengths[True],
            "rollout_tokens": lengths[False],
            "padded_tokens": sum(padded),
            "microbatches": sum(count),
            "seconds_rollout": generated - started,
            "seconds_train": ended - generated,
            "tokens_per_second": sum(lengths.values()) / (ended - started),
            "peak_memory_mb": max(peak),
        }
        return {"step": number, **metrics}, [{"step": number, **sample} for sample in samples]

    def _problem(self, example: Example) -> Problem:
        prompt = self.prompter.encode_prompt(example)
        if not prompt:
            raise UserError(f"{example.source or example.task}: the prompt is empty; there is nothing to continue")
        uses_demo = self.learns_from_demos and example.demonstration is not None
        return Problem(example, prompt, self.prompter.encode_demonstration(example) if uses_demo else None)

    def _check_lengths(self) -> None:
        """A sequence cannot be cut: the longest that may come must fit the budget and the model's positions."""
        generated = self.config.rollout.max_new_tokens if self.learns_from_rollouts else 0
        lengths = [(len(p.prompt), max(generated, len(p.demonstration or ())), p.example) for p in self.problems]
        lengths = [each for each in lengths if each[1]]  # nothing follows a prompt that is not learned from
        if not lengths:
            return
        prompt, completion, example = max(lengths, key=lambda each: each[0] + each[1])
        what = "rollout.max_new_tokens" if completion == generated else "its demonstration"
        found = f"{prompt + completion} tokens (prompt {prompt} + {what} {completion})"
        positions = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        for limit, name, advice in [
            (self.config.train.token_budget, "train.token_budget is", "raise it or shorten"),
            (positions, "the model's max_position_embeddings is", "shorten"),
        ]:
            if prompt + completion > limit:
                where = example.source or example.task
                raise UserError(f"{where}: {found}, but {name} {limit}; {advice} {what} or the prompt")

    def _draw(self, number: int) -> list[Problem]:
        """The prompts of a step: every one once, then all of them again in another order."""
        count, size = self.config.train.prompts_per_step, len(self.problems)
        drawn = []
        for position in range((number - 1) * count, number * count):
            epoch, index = divmod(position, size)
            if not drawn or not index:
                order = random.Random(f"{self.config.train.seed}/{epoch}").sample(range(size), size)
            drawn.append(self.problems[order[index]])
        return drawn

    def _roll_out(self, problems: list[Problem], number: int) -> list[list[Rollout]]:
        rollout = self.config.rollout
        return self.engine.generate(
            [problem.prompt for problem in problems],
            rollout.per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            seed=self.config.train.seed * 1_000_003 + number,
        )

    def _score(
        self, problems: list[Problem], groups: list[list[Rollout]]
    ) -> tuple[list[Sequence], list[dict[str, Any]], dict[str, float]]:
        """Rewards and advantages: what to learn from, some generations to look at, and metrics of the rollouts."""
        loss = self.config.loss
        with_demo = [problem for problem in problems if problem.demonstration]
        texts = [self.prompter.decode(rollout.tokens) for group in groups for rollout in group]
        owners = [problem.example for problem, group in zip(problems, groups) for _ in group]
        demos = [problem.example for problem in with_demo]
        rewards = iter(self.scorer(owners + demos, texts + [example.demonstration for example in demos]))
        grouped = [[next(rewards) for _ in group] for group in groups]
        of_demo = [next(rewards) if problem.demonstration else None for problem in problems]

        sequences, samples, text = [], [], iter(texts)
        switched = loss.preset == "hpt"
        for problem, group, scores, demo_score in zip(problems, groups, grouped, of_demo):
            *advantages, demo_advantage = group_advantages(
                [*scores, demo_score], std=loss.advantage_std, eps=loss.advantage_eps
            )
            of_problem = []
            for rollout, reward, advantage in zip(group, scores, advantages):
                sample = {
                    "task": problem.example.task,
                    "prompt": problem.example.messages[-1]["content"],
                    "completion": next(text),
                    "reward": reward,
                    "advantage": advantage,
                    "finished": rollout.finished,
                }
                if rollout is group[0]:
                    samples.append(sample)
                if reward is not None:  # a rollout that nobody could score teaches nothing
                    of_problem.append(Sequence(problem.prompt, rollout.tokens, False, reward, advantage))
            if problem.demonstration:
                # An unscored demonstration is still imitated; with advantage 0 it has no RL term.
                of_problem.append(
                    Sequence(problem.prompt, problem.demonstration, True, demo_score or 0.0, demo_advantage)
                )
            sequences += chosen(of_problem, loss.hpt_threshold) if switched else of_problem
        scored = [[r for r in scores if r is not None] for scores in grouped]
        rollouts = [rollout for group in groups for rollout in group]
        metrics = {
            "reward_mean": mean([r for scores in scored for r in scores]),
            "reward_std": std([r for scores in scored for r in scores]),
            "reward_demo": mean([r for r in of_demo if r is not None]),
            "informative": mean([float(min(scores) < max(scores)) for scores in scored if scores]),
            "response_tokens": mean([float(len(r.tokens)) for r in rollouts]),
            "finished": mean([float(r.finished) for r in rollouts]),
        }
        return sequences, samples[: self.config.run.samples_per_step], metrics

    def _learn(self, microbatches: list[Microbatch], number: int) -> dict[str, float]:
        """The step's updates; metrics are means over them (one, unless train.updates_per_rollout says more)."""
        updates = self.config.train.updates_per_rollout
        known: dict[str, Tensor] = {}
        if updates > 1:  # from the second update on the rollouts are no longer the policy's own
            known["old_logprobs"] = self._statistics(microbatches)[0]
        lines = [self._update(microbatches, number, known) for _ in range(updates)]
        return {name: mean([line[name] for line in lines]) for name in lines[0]}

    def _update(self, microbatches: list[Microbatch], number: int, known: dict[str, Tensor]) -> dict[str, float]:
        if not microbatches:  # nothing was scored, and there are no demonstrations
            return {"loss": 0.0, **self.optimizer.step(number - 1)}
        if "weight_entropy" in self.objective.needs_of_step(microbatches[0].annotations):
            # The mean entropy of the whole step has to be known before its first microbatch.
            stats, tokens = self._step(microbatches, *self._statistics(microbatches), known)
            known = known | {"weight_entropy": self.objective.weight_entropy(stats, tokens)}
        loss = torch.zeros((), device=self.loaded.device)
        outputs = []
        for microbatch in microbatches:
            annotations = microbatch.annotations | {name: row[microbatch.step_rows] for name, row in known.items()}
            part, *statistics = self._token_loss(microbatch, annotations)
            part.backward()
            loss += part.detach()
            outputs.append(statistics)
        metrics = {"loss": float(self.ranks.add(loss)), **self._token_metrics(microbatches, outputs, known)}
        return metrics | self.optimizer.step(number - 1)

    def _token_metrics(
        self, microbatches: list[Microbatch], outputs: list[tuple[Tensor, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, float]:
        """Token means over the whole step.

        They are formed once, from the log-probs and entropies of all tokens of the step, and not from the microbatches'
        means: to put those together, a mean over, say, positive rollout tokens needs another weight than one over all.
        """
        columns = (self._in_step_order(microbatches, list(column)).float() for column in zip(*outputs))
        stats, tokens = self._step(microbatches, *columns, known)
        is_demo, (demo_weight, rollout_weight) = tokens.is_demo, self.objective.entropy_weights(stats, tokens)
        values = self.objective.metrics(stats, tokens) | {
            "demo_entropy": stats.entropy[is_demo].mean(),
            "rollout_entropy": stats.entropy[~is_demo].mean(),
            "demo_entropy_weight": demo_weight[is_demo].mean(),
            "rollout_entropy_weight": rollout_weight[~is_demo].mean(),
        }
        return {name: float(value) for name, value in values.items()}

    def _step(
        self, microbatches: list[Microbatch], logprobs: Tensor, entropy: Tensor, known: dict[str, Tensor]
    ) -> tuple[sk.TokenStats, sk.Tokens]:
        """All tokens of the step as an objective sees them."""
        names = [*microbatches[0].annotations, "target"]
        tokens = sk.Tokens(**{name: self._gather(microbatches, name) for name in names}, **known)
        nowhere = torch.full_like(entropy, torch.nan)  # nothing that is asked of a whole step reads the log-sum-exp
        return sk.TokenStats(logprobs, entropy, nowhere), tokens

    def _head_input(self, microbatch: Microbatch) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """((hidden states (n, H) that predict the targets, head, targets (n,)), the head's other options).

        Prompts and padding stay behind. To be called where the head is whole: within `ranks.forward`.
        """
        inputs = microbatch.input_ids, microbatch.attention_mask, microbatch.position_ids
        hidden = hidden_states(self.loaded.model, *inputs)
        head = head_of(self.loaded.model)
        options = {
            "linear_bias": head.bias,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "temperature": self.config.rollout.temperature,
            "vocab_size": head.vocab_size,
        }
        return (hidden.flatten(0, 1)[microbatch.hidden_rows], head.weight, microbatch.target), options

    def _token_loss(self, microbatch: Microbatch, annotations: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(the microbatch's part of the loss, log-probs (n,), entropies (n,))."""

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            tensors, options = self._head_input(microbatch)
            out = self.loss_function(*tensors, self.objective, **options, **annotations)
            return out.loss, out.logprobs, out.entropy

        return self.ranks.forward(forward)

    @torch.no_grad()
    def _statistics(self, microbatches: list[Microbatch]) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of the step's N tokens under the model as it is now."""

        def score(microbatch: Microbatch) -> sk.TokenStats:
            tensors, options = self._head_input(microbatch)
            return sk.linear_logprobs(*tensors, **options)

        stats = [self.ranks.forward(lambda m=m: score(m)) for m in microbatches]
        return (
            self._in_step_order(microbatches, [s.logprobs for s in stats]),
            self._in_step_order(microbatches, [s.entropy for s in stats]),
        )

    def _gather(self, microbatches: list[Microbatch], name: str) -> Tensor:
        parts = [m.target if name == "target" else m.annotations[name] for m in microbatches]
        return self._in_step_order(microbatches, parts)

    def _in_step_order(self, microbatches: list[Microbatch], parts: list[Tensor]) -> Tensor:
        """(N,): one tensor per microbatch, of all ranks, put together in the order of the step's tokens."""
        if not parts:
            return torch.zeros(0)
        order, values = self.ranks.rows(torch.cat([m.step_rows for m in microbatches]), torch.cat(parts))
        return torch.empty_like(values).index_copy_(0, order, values)
