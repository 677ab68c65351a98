"""Evaluation on held-out prompts: avg@k and pass@k over all prompts and per task, and the loss of their demonstrations.

The prompts and the sampling seed are fixed, so that two models are compared on the same questions. Where nothing can
verify an answer, as in most chats, the loss of the demonstrations is the evaluation, and nothing is generated.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srft.config import Config, EvalConfig
from srft.data import Example, Prompter, build_prompter, fit, load_examples
from srft.errors import UserError
from srft.likelihood import demonstration_loss
from srft.metrics import mean
from srft.model import EMBEDDED, POSITIONS, load_model, positions
from srft.rewards import Scorer, build_reward, check_answers
from srft.rollout import Engine, build_engine
from srft.rundir import finite

SOLVED = 1 - 1e-6  # a completion is correct from this reward on: scorers give parts of a point for parts of an answer


@dataclass(frozen=True)
class Scores:
    """Means over prompts. NaN where nothing of a task was scored."""

    prompts: int
    reward: float  # avg@k: mean reward of the k samples
    pass_at: dict[int, float]  # {n: chance that at least one of n samples is correct}
    finished: float  # share of samples that ended by themselves
    tokens: float  # mean length
    scored: float  # share of samples that were scored; the others are left out


@dataclass(frozen=True)
class Evaluation(Scores):
    samples: int  # k; 0: nothing was generated
    seed: int
    loss: float = math.nan  # mean −log p of the demonstrations' tokens; NaN: there are none
    loss_tokens: int = 0
    on: str = ""  # what tells the held-out prompts and how they were sampled from others
    tasks: dict[str, Scores] = field(default_factory=dict)
    generations: list[dict[str, Any]] = field(default_factory=list)  # one per prompt, its k completions with rewards

    @property
    def score(self) -> float:
        """What is better the more it is: the reward, or where nothing was scored minus the loss."""
        return -self.loss if math.isnan(self.reward) else self.reward

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def comparable(self, other: "Evaluation") -> bool:
        """Were both measured on the same prompts in the same way?"""
        return all(getattr(self, n) == getattr(other, n) for n in ("on", "prompts", "samples", "seed", "loss_tokens"))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Evaluation":
        """From a line of evaluation.jsonl. JSON has no NaN and no numbers as keys."""

        def numbers(scores: dict[str, Any]) -> dict[str, Any]:
            scores = {key: math.nan if value is None else value for key, value in scores.items()}
            levels = {int(k): math.nan if v is None else v for k, v in scores["pass_at"].items()}
            return {"scored": 1.0, **scores, "pass_at": levels}

        tasks = {task: Scores(**numbers(scores)) for task, scores in row["tasks"].items()}
        return cls(**numbers({key: value for key, value in row.items() if key != "step"}) | {"tasks": tasks})


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one (unbiased; arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(
    engine: Engine,
    examples: list[Example],
    prompter: Prompter,
    scorer: Scorer | None,
    config: EvalConfig,
    max_new_tokens: int,
    loss: tuple[float, int] = (math.nan, 0),
    prompts: list[list[int]] | None = None,
) -> Evaluation:
    """Sample `config.samples` completions of every example and score them; without a scorer there is the loss alone.

    loss: what likelihood.py says of their demonstrations.   prompts: their token ids; None: as the prompter has them.
    Raises UserError when nothing was scored: there is no number to give then.
    """
    sampled = [config.samples, config.temperature, config.top_p, config.seed, max_new_tokens]
    on = identity([each.messages for each in examples], [each.answer for each in examples], sampled)
    if scorer is None:
        none = Scores(len(examples), math.nan, {}, math.nan, math.nan, 1.0)
        return Evaluation(**vars(none), samples=0, seed=config.seed, loss=loss[0], loss_tokens=loss[1], on=on)
    groups = engine.generate(
        [prompter.encode_prompt(example) for example in examples] if prompts is None else prompts,
        config.samples,
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    engine.release()
    rollouts = [rollout for group in groups for rollout in group]
    texts = [prompter.decode(rollout.tokens) for rollout in rollouts]
    rewards = iter(
        scorer(
            [example for example in examples for _ in range(config.samples)],
            texts,
            finished=[rollout.finished for rollout in rollouts],
            completion_ids=[rollout.tokens for rollout in rollouts],
        )
    )
    generations = []
    for example, group, start in zip(examples, groups, range(0, len(texts), config.samples)):
        generations.append(
            {
                "task": example.task,
                "prompt": example.messages[-1]["content"],
                "answer": example.answer,
                "completions": texts[start : start + config.samples],
                "rewards": [next(rewards) for _ in group],
                "finished": [rollout.finished for rollout in group],
                "tokens": [len(rollout.tokens) for rollout in group],
            }
        )
    tasks = sorted({example.task for example in examples})
    per_task = {task: _scores([g for g in generations if g["task"] == task], config.samples) for task in tasks}
    overall = _scores(generations, config.samples)
    if math.isnan(overall.reward):
        raise UserError(
            f"reward.name {scorer.name!r}: none of {len(texts)} completions of {len(examples)} held-out prompts was "
            "scored (every reward is None); give the data what the reward compares with, or take another reward"
        )
    return Evaluation(
        **vars(overall), samples=config.samples, seed=config.seed, loss=loss[0], loss_tokens=loss[1], on=on,
        tasks=per_task, generations=generations,
    )  # fmt: skip


def identity(*parts: Any) -> str:
    """A short text that is the same for the same parts."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:16]


def scorer_for(scorer: Scorer, config: Config, held_out: list[Example]) -> Scorer | None:
    """None where the reward compares with answers, no held-out example has one, and demonstrations have a loss.

    Raises UserError where there is nothing to measure by.
    """
    answers = any(each.answer is not None for each in held_out)
    if scorer.needs_answer and not answers and any(each.demonstration is not None for each in held_out):
        return None
    check_answers(scorer, config.data, held_out)
    return scorer


def _scores(generations: list[dict[str, Any]], samples: int) -> Scores:
    """Prompts count alike; completions that were not scored are left out, and prompts without a scored one too."""
    scored = [[r for r in g["rewards"] if r is not None] for g in generations]
    scored = [rewards for rewards in scored if rewards]
    correct = [sum(r >= SOLVED for r in rewards) for rewards in scored]
    levels = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    return Scores(
        prompts=len(generations),
        reward=mean([mean(rewards) for rewards in scored]),
        pass_at={
            k: mean([pass_at_k(len(rewards), c, k) for rewards, c in zip(scored, correct) if len(rewards) >= k])
            for k in levels
        },
        finished=mean([float(f) for g in generations for f in g["finished"]]),
        tokens=mean([float(t) for g in generations for t in g["tokens"]]),
        scored=mean([float(r is not None) for g in generations for r in g["rewards"]]),
    )


def table(evaluation: Evaluation) -> str:
    """The scores as lines of text, one per task and one for all, and the loss of the demonstrations."""
    lines = [] if math.isnan(evaluation.reward) else score_lines(evaluation)
    if evaluation.scored < 1:
        lines.append(f"{1 - evaluation.scored:.0%} of the completions were not scored and are left out")
    if evaluation.loss_tokens:
        lines.append(
            f"demonstrations: loss {evaluation.loss:.3f} nats per token, perplexity {evaluation.perplexity:.2f} "
            f"({evaluation.loss_tokens} tokens)"
        )
    return "\n".join(lines)


def score_lines(evaluation: Evaluation) -> list[str]:
    levels = list(evaluation.pass_at)
    header = ["task", "prompts", f"avg@{evaluation.samples}", *(f"pass@{k}" for k in levels), "finished", "tokens"]
    rows = [header]
    for name, scores in [*evaluation.tasks.items(), ("all", evaluation)]:
        if name == "all" and len(evaluation.tasks) == 1:
            continue
        numbers = [scores.reward, *scores.pass_at.values(), scores.finished]
        rows.append([name, str(scores.prompts), *(f"{n:.3f}" for n in numbers), f"{scores.tokens:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def main_eval(config: Config, checkpoint: str | None = None) -> Evaluation:
    """`srft eval`: evaluate `checkpoint` (a model's directory or name; default `model.path`), print table and JSON."""
    model = dataclasses.replace(config.model, path=checkpoint) if checkpoint else config.model
    if checkpoint not in (None, EMBEDDED) and Path(checkpoint).parent.is_dir() and not Path(checkpoint).exists():
        # A slip of the pen in a path; asked for it, a hub's client would retry for half a minute.
        advice = f"give one; a model of a hub is --model.path {checkpoint}"
        raise UserError(f"--checkpoint {checkpoint!r}: there is no such directory; {advice}")
    examples = load_examples(config.data, "eval", config.eval.prompts) if config.eval.prompts else []
    if not examples:
        raise UserError("eval.prompts: there is no held-out prompt to evaluate on")
    scorer = scorer_for(build_reward(config.reward, config.data), config, examples)
    loaded = load_model(model, "--checkpoint" if checkpoint else "model.path")
    prompter = build_prompter(loaded.tokenizer, config.data)
    generated = config.rollout.max_new_tokens if scorer else 0
    problems = fit(prompter, examples, True, {POSITIONS: positions(loaded.model)}, generated)
    examples = [problem.example for problem in problems]
    engine = build_engine(config.rollout.engine, loaded)
    loss = demonstration_loss(loaded, problems, config.train.token_budget)
    prompts = [problem.prompt for problem in problems]
    evaluation = evaluate(engine, examples, prompter, scorer, config.eval, config.rollout.max_new_tokens, loss, prompts)
    print(table(evaluation))
    scores = {name: value for name, value in evaluation.as_dict().items() if name != "generations"}
    print(json.dumps(finite({"model": model.path, **scores})))
    return evaluation
