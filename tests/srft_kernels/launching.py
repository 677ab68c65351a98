"""Every kernel launched by Triton's real path, on CPU tensors: `python -m tests.srft_kernels.launching DIRECTORY`.

Arguments are bound and specialised, kernels compiled for sm_90, and the C launcher calls the driver, as on a GPU; the
driver is the libcuda.so.1 in DIRECTORY (libcuda.c), which runs nothing, so that results mean nothing. Prints, as JSON,
what was compiled and launched for each call.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

import srft_kernels as sk
from bench.aot import OBJECTIVES
from bench.host import Products, as_on_cuda
from srft_kernels.rows import triton_rows

TOKENS, HIDDEN, VOCAB = (80, 125, 32), 16, 1000
ON_DEVICE = {"compact": False}


def drive(directory: Path) -> None:
    """Triton believes in one device of compute capability 9.0."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    ctypes.CDLL(directory / "libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    driver = nvidia.CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _: 0
    driver.get_device_capability = lambda *_: (9, 0)
    triton.runtime.driver.set_active(driver)


def calls() -> Iterator[tuple[str, Callable[[int], None]]]:
    """(what, a forward and backward of so many tokens)"""

    def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, w = torch.randn(tokens, HIDDEN, dtype=dtype), torch.randn(VOCAB, HIDDEN, dtype=dtype)
        target = torch.randint(VOCAB, (tokens,))
        target[::5] = -100
        return x.requires_grad_(), w.requires_grad_(), target

    def loss(objective, names, dtype, passes, how=ON_DEVICE, candidates=0, **options):
        def run(tokens: int) -> None:
            columns = {name: torch.rand(tokens) for name in names}
            if "advantages" in columns:
                columns["advantages"][tokens // 2 :] = 0
            if "is_demo" in columns:
                columns["is_demo"] = columns["is_demo"] > 0.5
            plan = sk.Plan(backend="triton", chunk_rows=16, gradient_rows=32, passes=passes, **how)
            each = {"extras": sk.Extras(candidates=torch.randint(VOCAB, (tokens, candidates)))} if candidates else {}
            columns |= options | each
            sk.linear_loss(*inputs(tokens, dtype), objective, plan=plan, **columns).loss.backward()

        return run

    for name, (objective, given) in OBJECTIVES.items():
        names = set(given) - {"class_weight"}
        if "weight_entropy" not in names:
            yield name, loss(objective, names, torch.bfloat16, 1)
    head = {"logit_scale": 0.5, "softcap": 30.0, "temperature": 0.7}
    yield "fp32, head", loss(sk.grpo(), {"advantages"}, torch.float32, 1, **head)
    yield "fp16, two passes, smoothed", loss(sk.CrossEntropy(label_smoothing=0.1), (), torch.float16, 2)
    yield "extras", loss(sk.sft(), (), torch.bfloat16, 1, extras=sk.Extras(rank=True, argmax=True, top_k=4))
    yield "candidates", loss(sk.sft(), (), torch.bfloat16, 1, candidates=3)
    yield "filter", loss(sk.sft(), (), torch.bfloat16, 1, ON_DEVICE | {"filter": sk.Filter(columns=0.1)})
    yield "callable", loss(lambda stats, tokens: -stats.logprobs, (), torch.bfloat16, 1)
    yield "idle tokens", loss(sk.reinforce(), {"advantages"}, torch.bfloat16, 1, {"compact": True})

    def scored(tokens: int) -> None:
        with torch.no_grad():
            x, w, target = inputs(tokens, torch.bfloat16)
            temperature = torch.ones(tokens)
            sk.linear_logprobs(x, w, target, temperature=temperature, plan=sk.Plan(backend="triton", compact=False))

    yield "scoring", scored
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):

        def distilled(tokens: int, kind: str = kind) -> None:
            x, w, _ = inputs(tokens, torch.bfloat16)
            t, v, _ = inputs(tokens, torch.bfloat16)
            plan = sk.Plan(backend="triton", chunk_rows=16, gradient_rows=32, compact=False)
            sk.linear_distillation(x, w, t, v, divergence=kind, plan=plan).loss.backward()

        yield f"distillation, {kind}", distilled


def main(directory: Path) -> None:
    launches, compiled = directory / "launches", []
    os.environ["LAUNCHES"] = str(launches)
    drive(directory)
    compile_ = JITFunction._do_compile

    def counted(self, *arguments, **options):
        compiled.append(self.fn.__name__)
        return compile_(self, *arguments, **options)

    scale = mock.patch("srft_kernels.engine._scaled_", triton_rows.scale_)
    found = []
    with as_on_cuda(), Products(), scale, mock.patch.object(JITFunction, "_do_compile", counted):
        for what, run in calls():
            for tokens in TOKENS:
                compiled.clear()
                launches.write_text("")
                run(tokens)
                launched = [line.split() for line in launches.read_text().splitlines()]
                found.append({"call": what, "tokens": tokens, "compiled": list(compiled), "launched": launched})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
