"""What an evaluation found: avg@k and pass@k over all prompts and per task, and the loss of the demonstrations."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from srft.metrics import mean

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


def scores_of(generations: list[dict[str, Any]], samples: int) -> Scores:
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
