"""Examples as token ids. What is too long is refused, left out or cut, as data.overlong says; with a word about all.

problems = fit(prompter, examples, config.data, True, {"train.token_budget": 2048}, generated=256)
"""

import dataclasses
import math
import sys
from collections.abc import Mapping

from srft.config import DataConfig
from srft.data.examples import Example
from srft.data.prompts import Problem, Prompter
from srft.errors import UserError

ADVICE = 'data.overlong = "drop" leaves such examples out, "cut" cuts them'


@dataclasses.dataclass(frozen=True)
class Excess:
    """A row that is too long: its tokens, of how many, and the message that says so."""

    tokens: float
    limit: float
    message: str


def fit(
    prompter: Prompter,
    examples: list[Example],
    config: DataConfig,
    with_demonstration: bool = False,
    limits: Mapping[str, float] | None = None,
    generated: int = 0,
) -> list[Problem]:
    """The examples as token ids, within data.max_prompt_tokens and `limits`, which bound a prompt with what follows it.

    limits: from the name of a limit to tokens.   generated: tokens that a rollout may have; 0 where none is made.
    Raises UserError for the longest where data.overlong is "error", for one that the chat template does not take where
    data.broken is, and where nothing is left.
    """
    limits = dict(sorted((limits or {}).items(), key=lambda each: each[1]))
    limit = min(limits.values(), default=math.inf)
    if config.overlong == "cut" and generated >= limit:
        raise UserError(
            f"rollout.max_new_tokens {generated}: a sequence may have {limit} tokens, none is left for a prompt"
        )
    problems: list[Problem] = []
    too_long: list[Excess] = []
    broken: list[UserError] = []
    for example in examples:
        try:
            problem: Problem | None = prompter.problem(example, with_demonstration)
            if excess := excess_of(problem, config.max_prompt_tokens, limits, generated):
                too_long.append(excess)
                cuts = config.overlong == "cut"
                problem = cut(problem, prompter, config.max_prompt_tokens, limit, generated) if cuts else None
        except UserError as error:
            if config.broken == "error":
                raise
            broken.append(error)
            continue
        problems += [problem] if problem else []
    if too_long:
        tell(too_long, len(examples), len(examples) - len(broken) - len(problems), config.overlong)
    if broken and not problems:
        raise UserError(f"{broken[0]} (nothing is left of {len(examples)} examples)")
    if broken:
        done = f"{len(broken)} of {len(examples)} examples are left out, the first: {broken[0]}"
        print(f"warning: data.broken: {done}", file=sys.stderr)
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


def cut(problem: Problem, prompter: Prompter, most: int, limit: float, generated: int) -> Problem | None:
    """A prompt keeps its end, where the question is; a demonstration its beginning, and has no end then.

    None where that is not enough.
    """
    demonstration = problem.demonstration
    follows = max(generated, min(len(demonstration or ()), limit // 2 if limit < math.inf else math.inf))
    room = min(most, limit - follows)
    if len(problem.prompt) > room:
        problem = with_shorter_prompt(problem, prompter, int(room))
    if problem and demonstration and len(problem.prompt) + len(demonstration) > limit:
        demonstration = demonstration[: int(limit) - len(problem.prompt)]
        example = dataclasses.replace(problem.example, demonstration=prompter.decode(demonstration))
        problem = Problem(example, problem.prompt, demonstration)  # this much of it is scored
    return problem


def with_shorter_prompt(problem: Problem, prompter: Prompter, room: int) -> Problem | None:
    """Turns lose their beginning, the first one first, the question last: what the system says stays, and what the chat
    template writes around the turns. None where that alone is longer than `room`."""
    example, prompt = problem.example, problem.prompt
    for number, turn in enumerate(example.messages):
        ids = prompter.ids(turn["content"] or "")
        while len(prompt) > room and len(ids) > 1 and turn["role"] not in ("system", "developer"):
            ids = ids[len(prompt) - room :] or ids[-1:]
            content = prompter.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            shorter = {**turn, "content": content.lstrip("\ufffd")}  # half a character
            messages = [*example.messages[:number], shorter, *example.messages[number + 1 :]]
            example = dataclasses.replace(example, messages=messages)
            prompt = prompter.encode_prompt(example)
    return Problem(example, prompt, problem.demonstration) if len(prompt) <= room else None


def tell(too_long: list[Excess], rows: int, left_out: int, overlong: str) -> None:
    count, longest = len(too_long), max(too_long, key=lambda each: each.tokens - each.limit)
    others = f"{count} of {rows} examples are too long, this one most; " if count > 1 else ""
    if overlong == "error":
        raise UserError(f"{longest.message} ({others}{ADVICE})")
    if left_out == rows:
        cannot = " and cannot be cut to that" if overlong == "cut" else ""
        raise UserError(f"{longest.message} (all {rows} examples are too long{cannot}, so nothing is left)")
    done = [f"{count - left_out} of {rows} examples are cut"] if count > left_out else []
    done += [f"{left_out} of {rows} examples are left out"] if left_out else []
    print(f"warning: data.overlong: {', '.join(done)}; the longest: {longest.message}", file=sys.stderr)


def shorten(example: Example, length: int = 60) -> str:
    text = max((turn["content"] or "" for turn in example.messages), key=len)
    return text if len(text) <= length else text[:length] + "…"
