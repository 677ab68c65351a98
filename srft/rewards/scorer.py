"""Scores completions by one reward or by several, and says what their rewards are made of.

    scorer = build_reward(config.reward, config.data)
    scorer(examples, completions, finished=…, completion_ids=…)              # [1.0, 0.0, None, …], None: not scored

A call that fails costs the completions that it fails on. A function that takes whole lists is then called with each
completion alone, to find them, and once more with the list of all others: it may compare a list's completions with each
other, so what it says of one alone is not what counts.
"""

import sys
import time
from collections.abc import Sequence
from multiprocessing.pool import RemoteTraceback
from typing import Any

from srft.data import Example
from srft.errors import UserError
from srft.rewards.functions import Function
from srft.rewards.pool import Job, Pool
from srft.rewards.worker import Failure, Part

FAILED = "reward_failed"


class Rewards(list):
    """One reward, or None (not scored), per completion.

    details: per completion the numbers that a step's metrics are made of: "reward/NAME" of each of several functions,
    or of each number in the dict that a function gave, and "reward_failed" where one of them failed.
    """

    def __init__(self, rewards: Sequence[float | None] = (), details: Sequence[dict[str, float]] = ()):
        super().__init__(rewards)
        self.details = list(details)


class Scorer:
    """name: of the rewards, for messages.   needs_answer: all of them compare with the column `answer`.

    rewards: a function, or what functions.py and builtin.py make of `reward.name`.   weights: of each; default 1.
    seconds: what a call may take for one completion, in a process of its own; workers: how many there are; 0: none.
    """

    def __init__(
        self,
        name: str,
        *rewards: Any,
        weights: Sequence[float] = (),
        seconds: float = 30.0,
        workers: int = 0,
    ):
        self.name, self.seconds = name, seconds
        self.rewards = [each if hasattr(each, "confined") else Function(name, each) for each in rewards]
        self.weights = list(weights) or [1.0] * len(self.rewards)
        self.labels = labels_of([each.name for each in self.rewards])
        self.needs_answer = all(each.needs_answer for each in self.rewards)
        self.pool = Pool(self.rewards, workers)
        self.patient: dict[int, float] = {}  # seconds per completion, for rewards whose lists take longer than one may
        self.warned: set[tuple[int, str]] = set()
        self.worked: set[int] = set()  # rewards that have scored a completion

    def __call__(
        self,
        examples: list[Example],
        completions: list[str],
        *,
        finished: list[bool] | None = None,
        completion_ids: list[list[int]] | None = None,
    ) -> Rewards:
        """One finite reward, or None, per completion. finished: which ended by themselves, by default all did.

        Raises UserError that names a function that raises for every completion, or gives what is no reward.
        """
        count = len(completions)
        if not count:
            return Rewards()
        columns = columns_of(examples) | {
            "prompts": [each.prompt for each in examples],
            "completions": list(completions),
            "finished": [True] * count if finished is None else list(finished),
            "completion_ids": [None] * count if completion_ids is None else list(completion_ids),
        }
        by_reward = self._by_reward(columns, count)
        combined = [self._combine(parts) for parts in zip(*by_reward)]
        return Rewards(*zip(*combined))

    def _combine(self, parts: Sequence[Part | Failure]) -> tuple[float | None, dict[str, float]]:
        """Of one completion: the weighted sum of the functions that score it; None where none does, or one failed."""
        total, details = None, {}
        for part, weight, label in zip(parts, self.weights, self.labels):
            if isinstance(part, Failure):
                continue
            reward, numbers = part
            several = len(self.rewards) > 1
            if reward is not None:
                total = (total or 0.0) + weight * reward
                details |= {f"reward/{label}": reward} if several else {}
            details |= {f"reward/{label}/{name}" if several else f"reward/{name}": n for name, n in numbers.items()}
        if any(isinstance(part, Failure) for part in parts):
            return None, details | {FAILED: 1.0}
        return total, details

    def _by_reward(self, columns: dict[str, list], count: int) -> list[list[Part | Failure]]:
        """Per reward and completion what it says; the calls of all rewards run side by side."""
        calls = [[[i] for i in range(count)] if each.single else [list(range(count))] for each in self.rewards]
        jobs = [
            self._job(number, columns, indices, self.patient.get(number, 0.0) * len(indices))
            for number, of_reward in enumerate(calls)
            for indices in of_reward
        ]
        answers = iter(self.pool.run(jobs))
        found = []
        for number, of_reward in enumerate(calls):
            given = [next(answers) for _ in of_reward]
            parts = spread(of_reward, given, count)
            if isinstance(given[0], Failure) and given[0].kind != "refused" and len(of_reward) < count:
                parts = self._around_faults(number, columns, count, given[0])
            self._tell(number, parts)
            found.append(parts)
        return found

    def _job(self, number: int, columns: dict[str, list], indices: list[int], seconds: float = 0.0) -> Job:
        wanted = {name: of for name, of in columns.items() if self.rewards[number].wants(name)}
        rows = {name: [of[i] for i in indices] for name, of in wanted.items()}
        return Job(number, rows, max(self.seconds, seconds))

    def _around_faults(self, number: int, columns: dict, count: int, failure: Failure) -> list[Part | Failure]:
        """The parts of a list whose call failed: which completions fail alone too, and what comes of all others."""
        alone = self.pool.run([self._job(number, columns, [i]) for i in range(count)])
        parts = spread([[i] for i in range(count)], alone, count)
        good = [i for i, part in enumerate(parts) if not isinstance(part, Failure)]
        if len(good) < 2:
            return parts
        began = time.monotonic()
        (again,) = self.pool.run([self._job(number, columns, good, self.seconds * len(good))])
        if isinstance(again, Failure):
            self._warn(
                number, "alone", f"a call with {len(good)} completions {again.words}, though it does with none "
                "of them alone; they are scored one at a time",
            )  # fmt: skip
            return parts
        if len(good) == count and failure.kind == "late":
            self.patient[number] = 4 * (time.monotonic() - began) / count
        for i, part in zip(good, again):
            parts[i] = part
        return parts

    def _tell(self, number: int, parts: list[Part | Failure]) -> None:
        """Raise what is a mistake in the function; warn of the first completion that was lost."""
        failures = [part for part in parts if isinstance(part, Failure)]
        where = f"reward.name {self.rewards[number].name!r}"
        for failure in failures:
            if failure.kind == "refused":
                raise UserError(failure.words)
        if len(failures) < len(parts):
            self.worked.add(number)
        raised = failures and all(failure.kind == "raised" for failure in failures) and len(failures) == len(parts)
        if raised and number not in self.worked:  # a call may be of one bad row alone
            message = f"{where}: the function {failures[0].words} (--debug shows where)"
            hint = "; TRL's functions for chats want reward.conversational = true"
            chat = "string indices must be integers" in message and not getattr(
                self.rewards[number], "conversational", 1
            )
            raise UserError(message + hint * chat) from RemoteTraceback(failures[0].trace)
        if failures:
            first = next((each for each in failures if each.called), failures[0])
            uncalled = sum(not each.called for each in failures)
            untried = f", {uncalled} of them not tried after calls that all failed" if uncalled else ""
            lost = f"{len(failures)} of {len(parts)} completions could not be scored{untried}, the first: it"
            self._warn(number, "lost", f"{lost} {first.words}; metric {FAILED} counts them")

    def _warn(self, number: int, kind: str, words: str) -> None:
        if (number, kind) not in self.warned:
            self.warned.add((number, kind))
            print(f"warning: reward.name {self.rewards[number].name!r}: {words}", file=sys.stderr)


def spread(calls: list[list[int]], answers: list[list[Part] | Failure], count: int) -> list[Part | Failure]:
    """What calls said of completions by their numbers, as one list; a failed call fails for all that it had."""
    parts: dict[int, Part | Failure] = {}
    for indices, answer in zip(calls, answers):
        parts |= dict(zip(indices, [answer] * len(indices) if isinstance(answer, Failure) else answer))
    return [parts[i] for i in range(count)]


def labels_of(names: list[str]) -> list[str]:
    """What each is called in metrics: the function's name alone, where no other has it."""
    short = [name.rpartition(":")[2] for name in names]
    return [name if short.count(label) > 1 else label for name, label in zip(names, short)]


def columns_of(examples: list[Example]) -> dict[str, list[Any]]:
    """What a reward function gets by name: one list per column, None where an example has no such column."""
    names = {name for each in examples for name in each.columns}
    columns = {name: [each.columns.get(name) for each in examples] for name in sorted(names)}
    names = ["answer", "demonstration", "task", *["choices"] * any(each.choices is not None for each in examples)]
    own = {name: [getattr(each, name) for each in examples] for name in names}
    return columns | own
