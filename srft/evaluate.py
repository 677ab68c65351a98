"""Evaluation on held-out prompts: completions of each are sampled and scored, and their demonstrations have a loss.

The prompts and the sampling seed are fixed, so that two models are compared on the same questions. Where nothing can
verify an answer, as in most chats, the loss of the demonstrations is the evaluation, and nothing is generated.
"""

import dataclasses
import json
import math
from pathlib import Path

from srft.config import Config, EvalConfig
from srft.data import Example, Problem, Prompter, build_prompter, digest, fit, load_examples
from srft.errors import UserError
from srft.evaluation import Evaluation, Scores, scores_of, table
from srft.learn.objective import build_objective
from srft.learn.stages import parts_of
from srft.likelihood import demonstration_loss
from srft.model import EMBEDDED, POSITIONS, load_model, load_tokenizer
from srft.rewards import FAILED, Scorer, build_reward, check_answers
from srft.rollout import Engine, build_engine
from srft.rundir import finite


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
    examples = [problem.example for problem in problems]
    on = measured_on(problems, config, max_new_tokens)
    if scorer is None:
        none = Scores(len(examples), math.nan, {}, math.nan, math.nan, 1.0)
        return Evaluation(**vars(none), samples=0, seed=config.seed, loss=loss[0], loss_tokens=loss[1], on=on)
    groups = engine.generate(
        [problem.prompt for problem in problems],
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
    scored = scorer(
        [example for example in examples for _ in range(config.samples)],
        texts,
        finished=[rollout.finished for rollout in rollouts],
        completion_ids=[rollout.tokens for rollout in rollouts],
    )
    rewards = iter(scored)
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
    per_task = {task: scores_of([g for g in generations if g["task"] == task], config.samples) for task in tasks}
    overall = scores_of(generations, config.samples)
    if math.isnan(overall.reward):
        failed = sum(FAILED in each for each in scored.details)
        why = "every reward is None); give the data what the reward compares with, or take another reward"
        if failed:
            why = f"{failed} calls of it failed, as told above); mend it, or what it asks"
        none = f"none of {len(texts)} completions of {len(examples)} held-out prompts was scored"
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
    config: Config, prompter: Prompter, examples: list[Example], scorer: Scorer | None, positions: float
) -> list[Problem]:
    """Held-out examples as token ids, of a model of so many positions.

    With their demonstrations where the loss of them tells something: where a stage of the run learns from
    demonstrations, and where nothing else can be measured.
    """
    objectives = [build_objective(part.config.loss) for part in parts_of(config)]
    learned = scorer is None or any("demonstrations" in each.learns_from for each in objectives)
    generated = config.rollout.max_new_tokens if scorer else 0
    return fit(prompter, examples, config.data, learned, {POSITIONS: positions}, generated)


def main_eval(config: Config, checkpoint: str | None = None) -> Evaluation:
    """`srft eval`: evaluate `checkpoint` (a model's directory or name; default `model.path`), print table and JSON."""
    model = dataclasses.replace(config.model, path=checkpoint) if checkpoint else config.model
    if checkpoint not in (None, EMBEDDED) and Path(checkpoint).parent.is_dir() and not Path(checkpoint).exists():
        # A slip of the pen in a path; asked for it, a hub's client would retry for half a minute.
        by_name = checkpoint.count("/") < 2 and not checkpoint.startswith((".", "/", "~"))
        advice = f"give one; a model of a hub is --model.path {checkpoint}" if by_name else "give one"
        raise UserError(f"--checkpoint {checkpoint!r}: there is no such directory; {advice}")
    examples = load_examples(config.data, "eval", config.eval.prompts) if config.eval.prompts else []
    if not examples:
        raise UserError("eval.prompts: there is no held-out prompt to evaluate on")
    scorer = scorer_for(build_reward(config.reward, config.data), config, examples)
    option = "--checkpoint" if checkpoint else "model.path"
    tokenizer, positions = load_tokenizer(model, option)
    prompter = build_prompter(tokenizer, config.data)
    problems = held_out_problems(config, prompter, examples, scorer, positions)
    loaded = load_model(model, option, tokenizer)
    engine = build_engine(config.rollout.engine, loaded)
    loss = demonstration_loss(loaded, problems, config.train.token_budget)
    evaluation = evaluate(engine, problems, prompter, scorer, config.eval, config.rollout.max_new_tokens, loss)
    print(table(evaluation))
    scores = {name: value for name, value in evaluation.as_dict().items() if name != "generations"}
    print(json.dumps(finite({"model": model.path, **scores})))
    return evaluation
