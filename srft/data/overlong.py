"""Rows that are too long: refused, left out or cut, as data.overlong says, with one word about all of them.

problems = fit(prompter, examples, True, {"train.token_budget": 2048}, generated=256)
"""

import dataclasses
import math
import sys
from collections.abc import Mapping

from srft.data.examples import Example
from srft.data.prompts import Problem, Prompter, shorten
from srft.errors import UserError

ADVICE = 'data.overlong = "drop" leaves such rows out, "cut" cuts them'


@dataclasses.dataclass(frozen=True)
class Excess:
    """A row that is too long: its tokens, of how many, and the message that says so."""

    tokens: float
    limit: float
    message: str


def fit(
    prompter: Prompter,
    examples: list[Example],
    with_demonstration: bool = False,
    limits: Mapping[str, float] | None = None,
    generated: int = 0,
) -> list[Problem]:
    """The examples as token ids, within data.max_prompt_tokens and `limits`, which bound a prompt with what follows it.

    limits: from the name of a limit to tokens.   generated: tokens that a rollout may have; 0 where none is made.
    Raises UserError for the longest where data.overlong is "error", and where nothing is left.
    """
    limits = dict(sorted((limits or {}).items(), key=lambda each: each[1]))
    problems: list[Problem] = []
    too_long: list[Excess] = []
    for example in examples:
        problem = prompter.whole(example, prompter.prompt_ids(example), with_demonstration)
        excess = excess_of(problem, prompter.max_prompt_tokens, limits, generated)
        if excess:
            too_long.append(excess)
        if excess and prompter.overlong == "cut":
            problem = cut(problem, prompter, min(limits.values(), default=math.inf), generated)
        if not excess or prompter.overlong == "cut":
            problems.append(problem)
    if too_long:
        tell(max(too_long, key=lambda each: each.tokens - each.limit), len(too_long), len(examples), prompter.overlong)
    return problems


def excess_of(problem: Problem, most: int, limits: Mapping[str, float], generated: int) -> Excess | None:
    where, prompt = problem.example.where, len(problem.prompt)
    if prompt > most:
        found = f"the prompt has {prompt} tokens, data.max_prompt_tokens is {most}; raise it or shorten"
        return Excess(prompt, most, f"{where}: {found} {shorten(problem.example)!r}")
    completion = max(generated, len(problem.demonstration or ()))
    what = "rollout.max_new_tokens" if completion == generated else "its demonstration"
    for name, limit in limits.items():
        if completion and prompt + completion > limit:  # nothing follows a prompt that is not learned from
            found = f"{prompt + completion} tokens (prompt {prompt} + {what} {completion}), but {name} is {limit}"
            advice = "raise it or shorten" if "." in name else "shorten"
            return Excess(prompt + completion, limit, f"{where}: {found}; {advice} {what} or the prompt")
    return None


def cut(problem: Problem, prompter: Prompter, limit: float, generated: int) -> Problem:
    """A prompt keeps its end, where the question is; a demonstration its beginning, and has no end then."""
    example, prompt, demonstration = problem.example, problem.prompt, problem.demonstration
    follows = max(generated, min(len(demonstration or ()), limit // 2 if limit < math.inf else math.inf))
    room = min(prompter.max_prompt_tokens, limit - follows)
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens {generated}: a sequence may have {limit} tokens, none is left for a prompt"
        )
    prompt = prompt[-int(min(room, len(prompt))) :]
    if demonstration and len(prompt) + len(demonstration) > limit:
        demonstration = demonstration[: int(limit) - len(prompt)]
        example = dataclasses.replace(
            example, demonstration=prompter.decode(demonstration)
        )  # this much of it is scored
    return Problem(example, prompt, demonstration)


def tell(longest: Excess, count: int, rows: int, overlong: str) -> None:
    others = f"{count} of {rows} rows are too long, this one most; " if count > 1 else ""
    if overlong == "error":
        raise UserError(f"{longest.message} ({others}{ADVICE})")
    if overlong == "drop" and count == rows:
        raise UserError(f"{longest.message} (all {rows} rows are too long, so nothing is left)")
    done = "left out" if overlong == "drop" else "cut"
    print(f"warning: data.overlong: {count} of {rows} rows are {done}; the longest: {longest.message}", file=sys.stderr)
