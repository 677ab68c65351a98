"""What an evaluation found: avg@k and pass@k over all prompts and per task, and the loss of the demonstrations."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from srft.intervals import UNKNOWN, Interval, interval_of, shown
from srft.metrics import mean
from srft.tables import aligned

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
    interval: Interval = UNKNOWN  # of reward
    pass_intervals: dict[int, Interval] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
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
            intervals = {int(k): interval(each) for k, each in scores.get("pass_intervals", {}).items()}
            of_reward = interval(scores.get("interval", UNKNOWN))
            return {"scored": 1.0, **scores, "pass_at": levels, "pass_intervals": intervals, "interval": of_reward}

        def interval(ends: list[float | None]) -> Interval:
            return tuple(math.nan if end is None else end for end in ends)

        tasks = {task: Scores(**numbers(scores)) for task, scores in row["tasks"].items()}
        return cls(**numbers({key: value for key, value in row.items() if key != "step"}) | {"tasks": tasks})


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one (unbiased; arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def levels_of(samples: int) -> list[int]:
    """Of how many samples pass@ is told: 1, 2, 4, … and all."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def scores_of(generations: list[dict[str, Any]], samples: int) -> Scores:
    """Prompts count alike; completions that were not scored are left out, and prompts without a scored one too."""
    scored = [[r for r in g["rewards"] if r is not None] for g in generations]
    scored = [rewards for rewards in scored if rewards]
    correct = [sum(r >= SOLVED for r in rewards) for rewards in scored]
    levels = levels_of(samples)
    means = [mean(rewards) for rewards in scored]
    passed = {
        k: [pass_at_k(len(rewards), c, k) for rewards, c in zip(scored, correct) if len(rewards) >= k] for k in levels
    }
    return Scores(
        prompts=len(generations),
        reward=mean(means),
        interval=interval_of(means),
        pass_at={k: mean(values) for k, values in passed.items()},
        pass_intervals={k: interval_of(values) for k, values in passed.items()},
        finished=mean([float(f) for g in generations for f in g["finished"]]),
        tokens=mean([float(t) for g in generations for t in g["tokens"]]),
        scored=mean([float(r is not None) for g in generations for r in g["rewards"]]),
    )


def table(evaluation: Evaluation) -> str:
    """The scores as lines of text, one per task and one for all, and the loss of the demonstrations."""
    return "\n".join([*aligned(rows_of_tasks(evaluation)), *notes(evaluation)])


def notes(evaluation: Evaluation, unscored: str = "are left out") -> list[str]:
    """What is said below the table. unscored: what became of completions that were not scored."""
    lines = []
    if evaluation.scored < 1:
        lines.append(f"{1 - evaluation.scored:.2%} of the completions were not scored and {unscored}")
    if evaluation.loss_tokens:
        lines.append(
            f"demonstrations: loss {evaluation.loss:.3f} nats per token, perplexity {evaluation.perplexity:.2f} "
            f"({evaluation.loss_tokens} tokens)"
        )
    return lines


def rows_of_tasks(evaluation: Evaluation) -> list[list[str]]:
    """The cells of the table; none where nothing was scored."""
    if math.isnan(evaluation.reward):
        return []
    levels = list(evaluation.pass_at)
    passed = [f"pass@{k}" for k in levels]
    header = ["task", "prompts", f"avg@{evaluation.samples}", "95 %", *passed, "finished", "tokens"]
    rows = [header]
    for name, scores in [*evaluation.tasks.items(), ("all", evaluation)]:
        if name == "all" and len(evaluation.tasks) == 1:
            continue
        numbers = [f"{n:.3f}" for n in (*scores.pass_at.values(), scores.finished)]
        reward = [f"{scores.reward:.3f}", shown(scores.interval)]
        rows.append([name, str(scores.prompts), *reward, *numbers, f"{scores.tokens:.1f}"])
    return rows
