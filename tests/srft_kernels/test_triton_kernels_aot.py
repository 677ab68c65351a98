"""Every Triton row kernel compiles for every target, with no spills and 16-byte loads of rows."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

from bench import aot

# The ptxas of Triton 3.8 holds these to 64 and 72 registers, for another resident program, and moves 8 or 16 bytes of a
# thread out for it (docs/kernel-notes.md).
SPILLED = {
    "statistics, extras, temperatures",
    "distillation, fp32 jensen_shannon, plain",
    "distillation, bf16 jensen_shannon, biases, scales, caps, temperatures",
}
NEW = tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 8)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_without_spills_and_with_wide_loads(target, tmp_path):
    # its own process: the tests' own runs Triton's interpreter, which does not compile
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-m", "bench.aot", target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    expected = {"statistics", "gradient", "loss_gradient", "distillation", "add_product", "scored", "scale", "prepare"}
    assert {row["kernel"] for row in rows} == expected
    for row in rows:
        moved = 16 if NEW and f"{row['kernel']}, {row['variant']}" in SPILLED else 0
        assert row["spill"] <= moved, row
        # beside per-row scalars (a row's target, weight, annotations), everything is a 16-byte load
        scalars = [width for width in row["loads"] if width < 128]
        wide = [width for width in row["loads"] if width == 128]
        # a few numbers per token, and one kernel for any number of them
        assert row["kernel"] in ("scored", "prepare") or (wide and len(scalars) <= 12), row
        assert row["registers"] * row["warps"] <= 128 * 16 and row["programs"] >= 1, row  # they fit a multiprocessor
        assert row["loops"] or row["kernel"] in ("scored", "scale", "prepare"), row
        if not any(word in row["variant"] for word in ("cap", "smoothed", "temperatures")):
            assert all(loop["calls"] <= 1 for loop in row["loops"]), row  # divisions are not of every number


def test_loops_are_what_lies_between_a_label_and_a_branch_back():
    code = ["LDC R1 ;", ".L_x_0:", "IADD R0 ;", ".L_x_1:", "FADD R2 ;", "BAR.SYNC 0x0 ;", "BRA `(.L_x_1) ;",
            "BRA `(.L_x_2) ;", "BRA `(.L_x_0) ;", ".L_x_2:", "EXIT ;"]  # fmt: skip
    assert aot.innermost_loops(code) == [["FADD R2 ;", "BAR.SYNC 0x0 ;", "BRA `(.L_x_1) ;"]]
    amd = [".LBB0_1:", "v_add_f32 v0, v1, v2", "s_cbranch_scc1 .LBB0_1", "s_branch .LBB0_2", ".LBB0_2:", "s_endpgm"]
    assert aot.innermost_loops(amd) == [amd[1:3]]


def test_occupancy():
    # registers are given out 256 at a time per warp: 40 · 512 threads three times, 41 → 48 only twice
    assert [aot.resident("sm_90", 16, registers, 64) for registers in (32, 40, 41, 64, 65)] == [4, 3, 2, 2, 1]
    assert aot.resident("sm_80", 4, 32, 60_000) == 2  # by shared memory
    assert aot.resident("gfx942", 16, 64, 0) == 2
    assert aot.resident("gfx942", 8, 64, 65_536) == 1  # all of a compute unit's


def test_table_replaces_its_own_section_and_no_other(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n", encoding="utf-8")
    row = {"kernel": "statistics", "variant": "plain", "target": "sm_90", "block": 8192, "warps": 16, "registers": 40,
           "spill": 8, "loads": [32, 128], "stores": [32, 32], "shared": 64, "programs": 3,
           "loops": [{"instructions": 22.4, "barriers": 9, "calls": 0}]}  # fmt: skip
    aot.put(page, [row])
    page.write_text(page.read_text(encoding="utf-8") + "after\n", encoding="utf-8")
    aot.put(page, [{**row, "registers": 44}])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("<!-- aot ") == 1
    assert "| statistics | plain | sm_90 | 44, 8 B spilled | 3 | 22.4 | 9 | 1×16 B, 2×4 B |" in text
