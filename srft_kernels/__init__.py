"""The loss head of LLM fine-tuning: log-probs, entropy and any SFT + RL loss of a vocabulary projection, exactly and
without its logits. See `linear_loss`, `linear_logprobs`, `linear_cross_entropy`."""

from . import reference
from .averages import constant_length, hpt_switch, sequence_mean, token_mean
from .distillation import DistillationOutput
from .extras import Extras, TokenExtras
from .functional import linear_cross_entropy, linear_distillation, linear_logprobs, linear_loss
from .modules import LinearCrossEntropyLoss, SRFTLoss
from .objectives import HPT, SRFT, Correction, CrossEntropy, PolicyGradient, Tokens, TokenStats
from .objectives import presets as presets
from .objectives.presets import (
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
from .output import LossOutput
from .plan import Filter, Plan

__version__ = "0.1.0"

__all__ = [
    "HPT",
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
