"""Credit: what of a prompt's completions is learned from, and how much better each did than the others of its group.

groups = scored(scorer, prompter, problems, rollouts)
advantages = advantages_of(group, config.loss)          # over the rollouts and the demonstration
sequences_of(group, advantages)                         # what there is to learn from; HPT chooses by `switched`
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch

import srft_kernels as sk
from srft.config import LossConfig
from srft.data import Problem, Prompter
from srft.learn.packing import Sequence
from srft.metrics import mean, std
from srft.rewards import Scorer
from srft.rollout import Rollout


@dataclass(frozen=True)
class Group:
    """A prompt's completions and their rewards, those of its demonstration included. A reward of None: not scored."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: list[float | None]  # of each rollout
    demo_reward: float | None
    details: list[dict[str, float]] = field(default_factory=list)  # of each rollout: what its reward is made of


def scored(scorer: Scorer, prompter: Prompter, problems: list[Problem], rollouts: list[list[Rollout]]) -> list[Group]:
    """A group of each problem: all their rollouts, then the demonstrations, in one call of the scorer."""
    sampled = [(problem, rollout) for problem, each in zip(problems, rollouts) for rollout in each]
    shown = [problem for problem in problems if problem.demonstration]
    rewards = scorer(
        [problem.example for problem, _ in sampled] + [problem.example for problem in shown],
        [prompter.decode(rollout.tokens) for _, rollout in sampled] + [each.example.demonstration for each in shown],
        finished=[rollout.finished for _, rollout in sampled]
        + [problem.demonstration[-1] == prompter.end_id for problem in shown],  # one may have been cut
        completion_ids=[rollout.tokens for _, rollout in sampled] + [problem.demonstration for problem in shown],
    )
    one, details = iter(rewards), iter(rewards.details)
    of_rollouts = [[next(one) for _ in each] for each in rollouts]
    of_demos = [next(one) if problem.demonstration else None for problem in problems]
    return [Group(*each, [next(details) for _ in each[1]]) for each in zip(problems, rollouts, of_rollouts, of_demos)]


def advantages_of(group: Group, config: LossConfig) -> list[float]:
    """Of the rollouts, and last of the demonstration: 0 where there is none."""
    rewards = [*group.rewards, group.demo_reward]
    return group_advantages(rewards, std=config.advantage_std, eps=config.advantage_eps)


def group_advantages(rewards: SequenceOf[float | None], *, std: bool = True, eps: float = 1e-6) -> list[float]:
    """Advantages of one prompt's completions, its demonstration included (SRFT, Eq 6–7).

    `r − mean`, divided by `standard deviation + eps` if `std` (the sample deviation, as in GRPO; without it: Dr. GRPO).
    A reward of None means "not scored": it takes no part in the statistics and its advantage is 0.
    When all scored rewards are equal, every advantage is exactly 0: rounding in the mean must not leave a sign behind,
    because SRFT's rollout term looks at nothing but the sign.
    """
    scored = [reward for reward in rewards if reward is not None]
    if not scored or min(scored) == max(scored):
        return [0.0] * len(rewards)
    middle = fmean(scored)
    scale = stdev(scored) + eps if std else 1.0
    return [0.0 if reward is None else (reward - middle) / scale for reward in rewards]


def switched(sequences: list[Sequence], threshold: float) -> list[Sequence]:
    """HPT's switch (arXiv 2509.04419) for one prompt: its rollouts if enough are rewarded, else its demonstration."""
    is_demo = torch.tensor([sequence.is_demo for sequence in sequences])
    rewards = torch.tensor([sequence.reward for sequence in sequences])
    each = torch.arange(len(sequences))
    learns = sk.hpt_switch(is_demo, rewards, torch.zeros_like(each), each, threshold)  # as if a sequence were one token
    return [sequence for sequence, kept in zip(sequences, learns.tolist()) if kept]


def informative(group: Group, config: LossConfig) -> bool:
    """Does anything of it have an advantage? Rollouts that all failed have one where the demonstration did not."""
    return any(advantages_of(group, config))


def sequences_of(group: Group, advantages: SequenceOf[float]) -> list[Sequence]:
    """The rollouts that were scored, and the demonstration."""
    prompt, demonstration = group.problem.prompt, group.problem.demonstration
    sequences = [
        Sequence(prompt, rollout.tokens, False, reward, advantage, rollout.finished)
        for rollout, reward, advantage in zip(group.rollouts, group.rewards, advantages)
        if reward is not None  # a rollout that nobody could score teaches nothing
    ]
    if demonstration:
        # An unscored demonstration is still imitated; with advantage 0 it has no RL term.
        sequences.append(Sequence(prompt, demonstration, True, group.demo_reward or 0.0, advantages[-1]))
    return sequences


def reward_metrics(groups: SequenceOf[Group]) -> dict[str, float]:
    """How the rollouts of a step did."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [[reward for reward in group.rewards if reward is not None] for group in groups]
    rewards = [reward for of_group in scored for reward in of_group]
    details = [of_rollout for group in groups for of_rollout in group.details]
    parts = sorted({name for each in details for name in each if name.startswith("reward/")})
    return {
        "reward_mean": mean(rewards),
        "reward_std": std(rewards),
        "reward_demo": mean([group.demo_reward for group in groups if group.demo_reward is not None]),
        "reward_failed": sum(each.get("reward_failed", 0.0) for each in details),
        **{name: mean([each[name] for each in details if name in each]) for name in parts},
        "informative": mean([float(min(of_group) < max(of_group)) for of_group in scored if of_group]),
        "response_tokens": mean([float(len(rollout.tokens)) for rollout in rollouts]),
        "generated_tokens": sum(len(rollout.tokens) for rollout in rollouts),
        "finished": mean([float(rollout.finished) for rollout in rollouts]),
    }
