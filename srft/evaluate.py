"""Evaluation on held-out prompts: completions of each are sampled and scored, and their demonstrations have a loss.

The prompts and the sampling seed are fixed, so that two models are compared on the same questions. Where nothing can
verify an answer, as in most chats, the loss of the demonstrations is the evaluation, and nothing is generated.
"""

import math
from collections.abc import Sequence
from typing import Any

from srft.config import Config, EvalConfig
from srft.data import Example, Problem, Prompter, digest, fit
from srft.errors import UserError
from srft.evaluation import Evaluation, Scores, scores_of
from srft.learn.stages import Part
from srft.model import POSITIONS
from srft.rewards import FAILED, Scorer, check_answers
from srft.rollout import Engine


class Unscored(UserError):
    """No completion of an evaluation has a reward: there is no number to give then."""


def measured_on(problems: list[Problem], config: EvalConfig, max_new_tokens: int) -> str:
    """A text that is the same for what is measured on the same prompts in the same way."""
    sampled = [config.samples, config.temperature, config.top_p, config.seed, max_new_tokens]
    return digest([*((each.example.messages, each.example.answer) for each in problems), sampled])[:16]


def evaluate(
    engine: Engine,
    problems: list[Problem],
    prompter: Prompter,
    scorer: Scorer | None,
    config: EvalConfig,
    max_new_tokens: int,
    loss: tuple[float, int] = (math.nan, 0),
) -> Evaluation:
    """Sample `config.samples` completions of every problem and score them; without a scorer there is the loss alone.

    loss: what likelihood.py says of their demonstrations.
    Raises Unscored when nothing was.
    """
    on = measured_on(problems, config, max_new_tokens)
    if scorer is None:
        none = Scores(len(problems), math.nan, {}, math.nan, math.nan, 1.0)
        return Evaluation(**vars(none), samples=0, seed=config.seed, loss=loss[0], loss_tokens=loss[1], on=on)
    generations = sampled(engine, problems, prompter, scorer, config, max_new_tokens)
    return evaluation_of(generations, scorer, config, on, loss)


def sampled(
    engine: Engine,
    problems: Sequence[Problem],
    prompter: Prompter,
    scorer: Scorer,
    config: EvalConfig,
    max_new_tokens: int,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`config.samples` completions of every problem, with rewards. settings: of Engine.generate."""
    examples = [problem.example for problem in problems]
    groups = engine.generate(
        [problem.prompt for problem in problems],
        config.samples,
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        **settings,
    )
    engine.release()
    rollouts = [rollout for group in groups for rollout in group]
    texts = [prompter.decode(rollout.tokens) for rollout in rollouts]
    scored = scorer(
        [example for example in examples for _ in range(config.samples)],
        texts,
        finished=[rollout.finished for rollout in rollouts],
        completion_ids=[rollout.tokens for rollout in rollouts],
    )
    rewards, details = iter(scored), iter(scored.details)
    generations = []
    for example, group, start in zip(examples, groups, range(0, len(texts), config.samples)):
        generations.append(
            {
                "task": example.task,
                "prompt": example.messages[-1]["content"],
                "answer": example.answer,
                "completions": texts[start : start + config.samples],
                "rewards": [next(rewards) for _ in group],
                "failed": sum(FAILED in next(details) for _ in group),
                "finished": [rollout.finished for rollout in group],
                "tokens": [len(rollout.tokens) for rollout in group],
            }
        )
    return generations


def evaluation_of(
    generations: list[dict[str, Any]], scorer: Scorer, config: EvalConfig, on: str, loss: tuple[float, int]
) -> Evaluation:
    """What was found with these completions. Raises Unscored where none has a reward."""
    tasks = sorted({each["task"] for each in generations})
    per_task = {task: scores_of([g for g in generations if g["task"] == task], config.samples) for task in tasks}
    overall = scores_of(generations, config.samples)
    if math.isnan(overall.reward):
        failed = sum(each["failed"] for each in generations)
        why = "every reward is None); give the data what the reward compares with, or take another reward"
        if failed:
            why = f"{failed} calls of it failed, as told above); mend it, or what it asks"
        count = sum(len(each["completions"]) for each in generations)
        none = f"none of {count} completions of {len(generations)} held-out prompts was scored"
        raise Unscored(f"reward.name {scorer.name!r}: {none} ({why}")
    return Evaluation(
        **vars(overall), samples=config.samples, seed=config.seed, loss=loss[0], loss_tokens=loss[1], on=on,
        tasks=per_task, generations=generations,
    )  # fmt: skip


def scorer_for(scorer: Scorer, config: Config, held_out: list[Example]) -> Scorer | None:
    """None where the reward compares with answers, no held-out example has one, and demonstrations have a loss.

    Raises UserError where there is nothing to measure by.
    """
    answers = any(each.answer is not None for each in held_out)
    if scorer.needs_answer and not answers and any(each.demonstration is not None for each in held_out):
        return None
    check_answers(scorer, config.data, held_out)
    return scorer


def held_out_problems(
    config: Config,
    prompter: Prompter,
    examples: list[Example],
    scorer: Scorer | None,
    positions: float,
    parts: Sequence[Part],
) -> list[Problem]:
    """Held-out examples as token ids, of a model of so many positions.

    With their demonstrations where the loss of them tells something: where a stage of the run learns from
    demonstrations, and where nothing else can be measured.
    """
    learned = scorer is None or any("demonstrations" in part.objective.learns_from for part in parts)
    generated = config.rollout.max_new_tokens if scorer else 0
    return fit(prompter, examples, config.data, learned, {POSITIONS: positions}, generated)
