"""The rewards that come with srft: exact match, math-verify, and the scorers of reasoning-gym's tasks.

Each is called with columns, lists of one length, and gives one reward, or None, per completion. What it needs besides
is imported by `load`, in the process where it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from srft.data.tasks import gym, make
from srft.errors import missing
from srft.rewards.answers import MarkRule, final_answer, is_answer, number, same, written_out
from srft.rewards.letters import chosen


class BuiltIn:
    """What `Scorer` asks of a reward.

    name: as in reward.name.   single: it is called with one completion at a time.   confined: it may hang or crash, so
    it runs in a process of its own.   needs_answer: it compares with `answer`.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]]
    single = confined = True
    needs_answer = True

    def load(self) -> None:
        """Import what it needs, in the process that calls it."""

    def wants(self, column: str) -> bool:
        return column in self.takes

    def missing(self, there: set[str]) -> set[str]:
        return set()


@dataclass
class Exact(BuiltIn):
    """1 where the completion's answer equals the reference, else 0; None without a reference.

    Of a multiple-choice question it is the letter that the completion chooses.
    """

    rule: MarkRule = field(default_factory=MarkRule)

    name = "exact"
    confined = False  # nothing in it can hang
    takes = frozenset({"prompts", "completions", "answer", "finished", "choices"})

    def __call__(
        self, prompts: list, completions: list, answer: list, finished: list, choices: list | None = None
    ) -> list[float | None]:
        options = choices or [None] * len(prompts)
        return [self.one(*row) for row in zip(prompts, completions, answer, finished, options)]

    def one(
        self, prompt: Any, completion: str, answer: str | None, finished: bool, choices: list[str] | None = None
    ) -> float | None:
        if not is_answer(answer):
            return None
        counted = self.rule.counted(prompt, completion, finished)
        if choices is not None:
            return float(counted is not None and chosen(counted, choices) == answer)
        return float(counted is not None and self.equal(counted, answer))

    def equal(self, completion: str, answer: str) -> bool:
        return same(completion, answer)


@dataclass
class MathVerify(Exact):
    """`exact`, or equal as mathematics (fractions, roots, sets, LaTeX) by math-verify."""

    name = "math_verify"
    confined = True  # sympy may take for ever; math-verify's own limits are signals and need a main thread

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:
            raise missing("math-verify", "reward.name 'math_verify'")

    def load(self) -> None:
        import math_verify  # noqa: F401

    def equal(self, completion: str, answer: str) -> bool:
        if same(completion, answer):
            return True
        from math_verify import parse, verify

        gold, given = final_answer(answer), final_answer(completion)
        # Its extractors look for $…$ around LaTeX; a bare formula is tried both ways. An exponent of ten may be meant.
        pairs = [(gold, f"${given}$"), (gold, completion), (written_out(gold), f"${written_out(given)}$")]
        return any(verify(parse(f"${gold}$"), parse(text)) for gold, text in dict.fromkeys(pairs))


@dataclass
class TaskReward(BuiltIn):
    """The scorers of reasoning-gym, each for the examples that its task made.

    Where the answer is a number a completion is right (1) or wrong (0): the scorers there give part of the reward to a
    wrong number that contains the right digits.
    """

    task_args: dict[str, Any]
    rule: MarkRule = field(default_factory=MarkRule)
    scorers: dict[str, Callable] = field(default_factory=dict, init=False)

    name = "reasoning_gym"
    needs_answer = False
    takes = frozenset({"prompts", "completions", "answer", "finished", "task", "metadata"})

    def load(self) -> None:
        gym()

    def __call__(self, prompts, completions, answer, finished, task, metadata) -> list[float | None]:
        return [self.one(*row) for row in zip(prompts, completions, answer, finished, task, metadata)]

    def one(self, question: Any, text: str, answer: str | None, finished: bool, task: str, metadata: Any):
        if answer is not None and not answer.strip():
            return None
        completion = self.rule.counted(question, text, finished)
        if completion is None:
            return 0.0
        if task not in self.scorers:
            self.scorers[task] = make(task, self.task_args, seed=0, size=1).score_answer
        numeric = number(answer) is not None
        given = final_answer(completion, numeric)
        if numeric and number(given) == number(answer):
            return 1.0
        score = float(self.scorers[task](given, {"question": question, "answer": answer, "metadata": metadata}))
        return float(score >= 1) if numeric else score
