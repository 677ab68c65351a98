"""The loss head of LLM fine-tuning: log-probs, entropy and any SFT + RL loss of a vocabulary projection, exactly and
without its logits. See `linear_loss`, `linear_logprobs`, `linear_cross_entropy`."""

from . import reference
from .aggregation import constant_length, hpt_switch, sequence_mean, token_mean
from .correction import Correction
from .distillation import DistillationOutput, linear_distillation
from .extras import Extras, TokenExtras
from .filter import Filter
from .functional import LossOutput, linear_cross_entropy, linear_logprobs, linear_loss
from .modules import LinearCrossEntropyLoss, SRFTLoss
from .objectives import CrossEntropy, PolicyGradient
from .plan import Plan
from .presets import (
    chord,
    cispo,
    dapo,
    dft,
    dr_grpo,
    grpo,
    gspo,
    hpt,
    luffy,
    reinforce,
    sapo,
    sft,
    srft_hpt,
    srft_official,
    srft_paper,
)
from .srft import SRFT
from .tokens import Tokens, TokenStats

__version__ = "0.1.0"

__all__ = [
    "SRFT",
    "Correction",
    "CrossEntropy",
    "DistillationOutput",
    "Extras",
    "Filter",
    "LinearCrossEntropyLoss",
    "LossOutput",
    "Plan",
    "PolicyGradient",
    "SRFTLoss",
    "TokenExtras",
    "TokenStats",
    "Tokens",
    "chord",
    "cispo",
    "constant_length",
    "dapo",
    "dft",
    "dr_grpo",
    "grpo",
    "gspo",
    "hpt",
    "hpt_switch",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "linear_loss",
    "luffy",
    "reference",
    "reinforce",
    "sapo",
    "sequence_mean",
    "sft",
    "srft_hpt",
    "srft_official",
    "srft_paper",
    "token_mean",
]
