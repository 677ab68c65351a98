"""Rewards that can be verified, of completions; a function that hangs or crashes costs one completion, not the run."""

from srft.rewards.answers import final_answer, is_answer, same
from srft.rewards.build import build_reward, check_answers
from srft.rewards.scorer import FAILED, Rewards, Scorer

__all__ = ["FAILED", "Rewards", "Scorer", "build_reward", "check_answers", "final_answer", "is_answer", "same"]
