"""Every Triton row kernel compiles for every target, with no spills and 16-byte loads of rows."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills_and_with_wide_loads(target, tmp_path):
    # its own process: the tests' own runs Triton's interpreter, which does not compile
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.srft_kernels.aot", target]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {
        "statistics_kernel",
        "gradient_kernel",
        "loss_gradient_kernel",
        "scale_kernel",
    }
    for row in rows:
        assert row["spill"] == 0, row
        # beside per-row scalars (a row's target, weight, annotations), everything is a 16-byte load
        scalars = [width for width in row["loads"] if width < 128]
        wide = [width for width in row["loads"] if width == 128]
        assert wide and len(scalars) <= 12, row
        assert row["registers"] <= 128, row  # 16 warps of them fit a multiprocessor
