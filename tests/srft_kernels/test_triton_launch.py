"""Launches by Triton's real path against a driver that runs nothing: what fails here would fail on the first GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Of each call, what was compiled and launched."""
    if COMPILER is None or not (HEADERS / "cuda.h").exists():
        pytest.skip("needs a C compiler and Triton's CUDA headers")
    directory = tmp_path_factory.mktemp("driver")
    library = directory / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{HEADERS}", HERE / "libcuda.c"]
    subprocess.run([*command, "-o", library], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    script = [sys.executable, "-m", "tests.srft_kernels.launching", str(directory)]
    run = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_is_bound_compiled_and_launched(launches):
    names = {name for call in launches for name, _, _ in call["launched"]}
    assert names == {"_statistics_kernel", "_gradient_kernel", "_loss_gradient_kernel", "_distillation_kernel",
                     "_add_product_kernel", "_scored_kernel", "_prepare_kernel", "_scale_kernel"}  # fmt: skip
    assert all(call["launched"] for call in launches)


def test_nothing_is_compiled_for_another_number_of_tokens(launches):
    """Which would stop training for a second or two, whenever it happens."""
    first = launches[0]["tokens"]
    for call in launches:  # the filter's product is compiled for numbers that 16 divides and for others
        compiled = [name for name in call["compiled"] if name != "_add_product_kernel"]
        assert call["tokens"] == first or not compiled, call


def test_grids_and_threads(launches):
    for call in launches:
        for name, grid, threads in call["launched"]:
            assert int(grid) > 0 and int(threads) % 32 == 0 and int(threads) <= 1024
            if name == "_prepare_kernel":
                assert int(grid) == 1
            if name == "_scale_kernel":
                assert int(grid) <= 8  # of one multiprocessor
