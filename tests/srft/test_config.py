"""The sections by themselves."""

import subprocess
import sys

import pytest

from srft.config import DataConfig, RolloutConfig
from srft.errors import UserError


def test_defaults_need_only_the_standard_library():
    forbidden = ["torch", "transformers", "jsonargparse", "yaml", "reasoning_gym", "pyarrow"]
    code = f"import sys, srft.config; srft.config.Config(); print([m for m in {forbidden} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_sections_made_by_hand_are_checked():
    with pytest.raises(UserError, match=r"rollout.per_prompt: expected at least 1, found 0"):
        RolloutConfig(per_prompt=0)
    with pytest.raises(UserError, match=r"data.max_prompt_tokens: a value is needed"):
        DataConfig(max_prompt_tokens=None)
