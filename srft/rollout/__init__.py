"""Rollout engines: what generates completions."""

from srft.rollout.build import build_engine
from srft.rollout.engine import Engine, Rollout

__all__ = ["Engine", "Rollout", "build_engine"]
