"""Objectives, a file each: what a token minimises. `objective.py` says what one is; `presets.py` has them by name."""

from .cross_entropy import CrossEntropy
from .objective import Objective, Tokens, TokenStats
from .policy_gradient import PolicyGradient
from .ratios import Correction
from .srft import HPT, SRFT

__all__ = ["HPT", "SRFT", "Correction", "CrossEntropy", "Objective", "PolicyGradient", "TokenStats", "Tokens"]
