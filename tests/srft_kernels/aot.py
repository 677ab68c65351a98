"""Compile every Triton row kernel ahead of time, with no GPU, and report what each compiled to.

    python -m tests.srft_kernels.aot [TARGET ...]        targets: sm_80 sm_90 sm_100 gfx942 (default: all)

One JSON object per line: kernel, variant, target, registers, spilled bytes, shared memory, width of the widest and
narrowest load of logits. Runs outside the interpreter: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import srft_kernels as sk
from srft_kernels.rows import triton_rows
from srft_kernels.rows.triton_objectives import COLUMNS, fused

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = 151_937  # odd: the loads must be wide for any vocabulary
F32, I64, U8, BF16 = "*fp32", "*i64", "*u8", "*bf16"
PLAIN = {"bias_ptr": None, "smooth_ptr": None, "softcap": None, "temperature": None}
RICH = {"bias_ptr": F32, "smooth_ptr": F32, "softcap": "fp32", "temperature": "fp32"}
POINTERS = {
    "logits_ptr": F32,
    "target_ptr": I64,
    "weight_ptr": F32,
    "out_ptr": F32,
    "entropy_ptr": F32,
    "m_ptr": F32,
    "log_s_ptr": F32,
    "is_demo_ptr": U8,
    "smooth_total_ptr": F32,
    "rows": "i32",
    "vocab": "i32",
    "stride": "i32",
    "dstride": "i32",
}
# the annotations' pointers come in the order of COLUMNS
ANNOTATION_POINTERS = dict(zip(COLUMNS, triton_rows._loss_gradient_kernel.arg_names[4 : 4 + len(COLUMNS)], strict=True))


def variants(order: str = "barrier"):
    """(kernel, name, {argument: Triton type, or a compile-time value}) of everything that is launched."""
    block = triton_rows._block(VOCAB)
    for name, head in (("plain", PLAIN), ("bias+smooth+cap+temperature", RICH)):
        yield triton_rows._statistics_kernel, name, {**head, "BLOCK": block["BLOCK"]}
        for out, pointer in (("fp32", F32), ("bf16", BF16)):
            coefs = {"g_ptr": F32, "h_ptr": F32, "k_ptr": F32, "u_ptr": F32 if head is RICH else None}
            coefs["smooth_total_ptr"] = coefs["u_ptr"]
            arguments = {
                **head,
                **coefs,
                "dlogits_ptr": pointer,
                "ORDER": "none" if out == "fp32" else order,
                "BLOCK": block["BLOCK"],
            }
            yield triton_rows._gradient_kernel, f"{name} {out}", arguments
    objectives = {
        "sft": (sk.CrossEntropy(), {}),
        "smoothed": (sk.CrossEntropy(label_smoothing=0.1, z_loss=1e-4), {"class_weight"}),
        "grpo": (sk.grpo(kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0), {"advantages", "old_logprobs", "ref_logprobs"}),
        "grpo on fresh data, clipped on one side": (sk.grpo(clip_low=None), {"advantages"}),
        "reinforce": (sk.reinforce(), {"advantages"}),
        "cispo": (sk.cispo(), {"advantages", "old_logprobs"}),
        "dft": (sk.dft(), set()),
        "luffy": (sk.luffy(), {"advantages", "is_demo", "old_logprobs"}),
        "chord": (sk.chord(0.5, token_weighted=True), {"advantages", "is_demo", "old_logprobs"}),
        "srft_hpt": (sk.srft_hpt(), {"advantages", "is_demo", "rewards", "weight_entropy"}),
        "srft_paper": (sk.srft_paper(), {"advantages", "is_demo", "rewards"}),
        "srft_official": (sk.srft_official(), {"advantages", "is_demo", "old_logprobs"}),
    }
    for name, (objective, given) in objectives.items():
        structure, numbers = fused(objective)
        columns = {
            ANNOTATION_POINTERS[column]: (U8 if column == "is_demo" else F32) if column in given else None
            for column in COLUMNS
        }
        rich = RICH if name == "smoothed" else PLAIN
        for out, pointer in (("fp32", F32), ("bf16", BF16)):
            arguments = {
                **rich,
                **columns,
                "smooth_total_ptr": F32 if rich is RICH else None,
                "dlogits_ptr": pointer,
                "numbers": ("fp32",) * len(numbers),
                "OBJECTIVE": structure,
                "ORDER": "none" if out == "fp32" else order,
                "BLOCK": block["BLOCK"],
            }
            yield triton_rows._loss_gradient_kernel, f"{name} {out}", arguments
    for pointer in (F32, BF16):
        yield triton_rows._scale_kernel, pointer, {"x_ptr": pointer, "factor_ptr": F32, "count": "i64", "BLOCK": 4096}


def compile_for(kernel, arguments: dict, target: GPUTarget, num_warps: int):
    """The compiled kernel, with the 16-byte hints that a launch on aligned tensors has."""
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name] if name in arguments else POINTERS[name]
        is_type = value in ("fp32", "i32", "i64") or isinstance(value, tuple) or str(value).startswith("*")
        if not is_type:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name] = value
        if str(value).startswith("*") or name in ("stride", "dstride", "count"):
            hints[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, hints), target, {"num_warps": num_warps})


def resources(compiled, target: GPUTarget) -> dict:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        widths = [32 * int(n or 1) for n in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
        spill = field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
        return {"registers": field("vgpr_count"), "spill": spill, "loads": widths}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    field = lambda name: int(re.search(rf"{name}:(\d+)", usage).group(1))  # noqa: E731
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    return {
        "registers": field("REG"),
        "spill": field("STACK") + field("LOCAL"),
        "loads": [int(vector or 1) * int(bits) for vector, bits in loads],
    }


def main(names: list[str]) -> None:
    for name in names or list(TARGETS):
        target = TARGETS[name]
        for kernel, variant, arguments in variants("reduction" if target.backend == "hip" else "barrier"):
            num_warps = triton_rows._block(VOCAB)["num_warps"] if "stride" in kernel.arg_names else 8
            compiled = compile_for(kernel, arguments, target, num_warps)
            found = resources(compiled, target)
            row = {"kernel": kernel.__name__.strip("_"), "variant": variant, "target": name, **found}
            print(json.dumps({**row, "shared": compiled.metadata.shared}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
