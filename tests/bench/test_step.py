"""The training step's rows, with nothing but what `make gpu` may count on."""

import subprocess
import sys

import pytest
import torch

from bench import step
from bench.environment import ROOT
from bench.inputs import Unavailable

OPTIONAL = ("jsonargparse", "gguf", "reasoning_gym", "math_verify", "datasets", "matplotlib", "pyarrow", "liger_kernel")
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # importing one raises ImportError
from bench import step
step.MODELS["cpu"]["vocab_size"] = 4096
rows = step.measure_step("cpu", rounds=2)
assert [(row.provider, row.status, len(row.seconds)) for row in rows] == [
    ("srft_kernels", "ok", 2), ("full logits", "ok", 2)], rows
ours, full = (row.extra for row in rows)
assert {{"peak_bytes", "ratio_to_products", "products_seconds", "tflops", "tokens_per_second"}} <= set(ours)
assert ours["tokens"] == full["tokens"] > 0 and ours["seconds_rollout"] == full["seconds_rollout"] > 0
assert ours["error"] < 1e-3 and full["peak_bytes"] > 4 * 4096 * ours["tokens"]  # the logits
"""


def test_it_needs_no_optional_package():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_missing_package_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "srft.rollout.transformers_engine", raising=False)
    with pytest.raises(Unavailable, match=r"training loop: .*transformers"):
        step.measure_step("cpu", 1)


def test_a_provider_that_runs_out_of_memory_or_is_wrong_is_told(monkeypatch):
    monkeypatch.setitem(step.MODELS["cpu"], "vocab_size", 4096)

    def greedy(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 60 GiB")

    def scaled(*arguments, **options):
        out = step.full_logits(*arguments, **options)
        return step.LossOutput(out.loss * 1.1, out.logprobs, out.entropy, out.logsumexp)

    losses = {"greedy": greedy, "scaled": scaled, "full logits": step.full_logits}
    greedy, scaled, full = step.measure_step("cpu", 1, losses=losses)
    assert (greedy.status, greedy.reason) == ("failed", "OutOfMemoryError: tried to allocate 60 GiB")
    assert scaled.status == "wrong" and not scaled.seconds
    assert full.status == "ok" and len(full.seconds) == 1
