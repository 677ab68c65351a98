"""Compile every Triton kernel ahead of time, with no GPU, and report what each compiled to.

    python -m bench.aot [TARGET ...]            targets: sm_80 sm_90 sm_100 gfx942 (default: all)
    python -m bench.aot --table FILE [...]      `make aot`: and put the table of this Triton into FILE, between markers

One JSON object per line: kernel, variant, target, warps; registers, spilled bytes and shared memory; the widths of
global loads and stores in bits; programs that fit a multiprocessor by them; and of each loop over a row (innermost
loops in the machine code, slow paths included) instructions per number, barriers and calls per step.
Runs outside the interpreter: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import srft_kernels as sk
from srft_kernels.distillation import DIVERGENCES
from srft_kernels.distillation import triton_rows as triton_distillation
from srft_kernels.head import Numbers
from srft_kernels.rows import triton_kernels, triton_residual, triton_rows, triton_vectors, tuning
from srft_kernels.rows.triton_objectives import column_names, twin

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory of a multiprocessor and its most threads; each has 65,536 registers, given out in 256s per warp, and
# room for 32 blocks (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
VOCAB = 151_937  # odd: the loads must be wide for any vocabulary
F32, I64, U8, BF16 = "*fp32", "*i64", "*u8", "*bf16"
EXTRAS = {"rank_ptr": "*i64", "argmax_ptr": "*i64", "normalizer_ptr": F32, "temperature_ptr": F32}
PLAIN = dict.fromkeys(("bias_ptr", "smooth_ptr", *EXTRAS)) | {"head": Numbers(None, None, None)}
RICH = PLAIN | {"bias_ptr": F32, "smooth_ptr": F32, "head": Numbers("fp32", "fp32", "fp32")}
TOLD = PLAIN | EXTRAS
FORWARD = {"BACKWARD": False}  # the order of a row's second read that the table does not have
VECTORS = {"scale": triton_rows.SCALE, "scored": triton_rows.SCORED, "prepare": triton_rows.PREPARE}
POINTERS = {
    "logits_ptr": F32,
    "target_ptr": I64,
    "weight_ptr": F32,
    "out_ptr": F32,
    "live_ptr": "*i1",
    **dict.fromkeys(("loss_ptr", "logprob_ptr", "entropy_ptr", "logsumexp_ptr", "smooth_sum_ptr"), F32),
    "safe_ptr": I64,
    "mean_ptr": F32,
    "m_ptr": F32,
    "log_s_ptr": F32,
    "is_demo_ptr": U8,
    "smooth_total_ptr": F32,
    "rows": "i32",
    "vocab": "i32",
    "stride": "i32",
    "dstride": "i32",
    "student_ptr": F32,
    "teacher_ptr": F32,
    "beta": "fp32",
    "when_ptr": U8,
    **dict.fromkeys(("m", "n", "k", "a_row", "a_column", "b_row", "c_row"), "i32"),
    "b_column": 1,
    "c_column": 1,
}
DIVISIBLE = ("stride", "dstride", "count", "m", "n", "k", "a_row", "a_column", "b_row", "c_row")  # by 16
OBJECTIVES = {
    "sft": (sk.CrossEntropy(), {}),
    "smoothed": (sk.CrossEntropy(label_smoothing=0.1, z_loss=1e-4), {"class_weight"}),
    "grpo": (sk.grpo(kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0), {"advantages", "old_logprobs", "ref_logprobs"}),
    "grpo on fresh data": (sk.grpo(clip_low=None), {"advantages"}),
    "reinforce": (sk.reinforce(), {"advantages"}),
    "cispo": (sk.cispo(), {"advantages", "old_logprobs"}),
    "dft": (sk.dft(), set()),
    "sapo, sampler's mismatch": (
        sk.sapo(correction=sk.Correction("mask", low=0.5)),
        {"advantages", "old_logprobs", "sampler_logprobs"},
    ),
    "luffy": (sk.luffy(), {"advantages", "is_demo", "old_logprobs"}),
    "chord": (sk.chord(0.5, token_weighted=True), {"advantages", "is_demo", "old_logprobs"}),
    "srft_hpt": (sk.srft_hpt(), {"advantages", "is_demo", "rewards", "weight_entropy"}),
    "srft_paper": (sk.srft_paper(), {"advantages", "is_demo", "rewards"}),
    "srft_official": (sk.srft_official(), {"advantages", "is_demo", "old_logprobs"}),
}
FP32_TOO = ("smoothed", "srft_paper")  # the gradient's type has nothing to do with the objective


def variants() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """(kernel, name, {argument: Triton type, or a compile-time value}) of everything that is launched."""
    outputs = (("bf16", {"dlogits_ptr": BF16}), ("fp32", {"dlogits_ptr": F32}))
    told = ("extras, temperatures", TOLD)
    for name, head in (("plain", PLAIN), ("bias, smoothing, scale, cap, temperature", RICH), told):
        smooth = {"u_ptr": head["smooth_ptr"], "smooth_total_ptr": head["smooth_ptr"]}
        yield triton_kernels._statistics_kernel, name, head
        for out, output in outputs:
            coefs = {"g_ptr": F32, "h_ptr": F32, "k_ptr": F32, **smooth}
            yield triton_kernels._gradient_kernel, f"{out} {name}", head | coefs | output
    for name, (objective, given) in OBJECTIVES.items():
        code = twin(objective, given)
        names = column_names(objective)
        head = RICH if name == "smoothed" else PLAIN
        arguments = {
            **head,
            "smooth_total_ptr": head["smooth_ptr"],
            "numbers": type(code.numbers)(*("fp32" for _ in code.numbers)),
            "columns": namedtuple("Columns", names)(
                *(None if name not in given else U8 if name == "is_demo" else F32 for name in names)
            ),
            "FORMULA": code.formula,
            "OBJECTIVE": code.structure,
        }
        for out, output in outputs if name in FP32_TOO else outputs[:1]:
            yield triton_kernels._loss_gradient_kernel, f"{out} {name}", arguments | output
            if name == "srft_paper":
                yield triton_kernels._loss_gradient_kernel, f"{out} {name}, forward", arguments | output | FORWARD
            if name == "sft":
                yield (
                    triton_kernels._loss_gradient_kernel,
                    f"{out} {name}, {told[0]}",
                    arguments | output | TOLD | FORWARD,
                )
    for kind in DIVERGENCES:
        for name, head in (("plain", PLAIN), ("biases, scales, caps, temperatures", RICH)):
            of_teacher = {f"teacher_{option}": head[option] for option in ("bias_ptr", "head")}
            forward = ("no", {"dlogits_ptr": None})
            for out, output in (*outputs, forward) if head is PLAIN else outputs[:1]:
                arguments = head | of_teacher | output | {"KIND": kind}
                yield triton_distillation._distillation_kernel, f"{out} {kind}, {name}", arguments
    for name, operand in (("bf16", BF16), ("fp32", F32)):
        # dx: the residual's rows by those of W; dW: its columns by the rows of x
        for product, strides in (("dx", {"a_column": 1}), ("dW", {"a_row": 1})):
            arguments = {"a_ptr": operand, "b_ptr": operand, "c_ptr": F32, **strides}
            yield triton_residual._add_product_kernel, f"{name} {product}", arguments
    capped = TOLD | {"head": Numbers(None, "fp32", None)}
    for name, head in (("scale, cap, temperature", RICH), ("cap, temperatures", capped)):
        yield triton_vectors._scored_kernel, name, {**head, "a_ptr": F32, "count": "i32", "k": "i32"}
    for out, pointer in (("bf16", BF16), ("fp32", F32)):
        yield triton_vectors._scale_kernel, out, {"x_ptr": pointer, "factor_ptr": F32, "count": "i64"}
    for name, weight in (("mean", None), ("token weights", F32)):
        yield triton_vectors._prepare_kernel, name, {"weight_ptr": weight, "count": "i32"}


def compile_for(kernel, arguments: dict[str, Any], target: GPUTarget, options: dict[str, int]):
    """The compiled kernel, with the 16-byte hints that a launch on aligned tensors has."""
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name] if name in arguments else POINTERS[name]
        if isinstance(value, tuple) and name != "OBJECTIVE":  # annotations or numbers, by name
            signature[name] = type(value)(*("constexpr" if item is None else item for item in value))
            constants |= {(i, j): None for j, item in enumerate(value) if item is None}
            hints |= {(i, j): [["tt.divisibility", 16]] for j, item in enumerate(value) if str(item).startswith("*")}
            continue
        is_type = value in ("fp32", "i32", "i64") or str(value).startswith("*")
        if not is_type:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name] = value
        if str(value).startswith("*") or (name in DIVISIBLE and not kernel.params[i].do_not_specialize):
            hints[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, hints), target, options)


def report(kernel, variant: str, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Compile one variant for one target and read what came out."""
    target = TARGETS[name]
    title = kernel.__name__.strip("_").removesuffix("_kernel")
    settings = launch(title, arguments, target)
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages") if option in settings}
    warps = options["num_warps"]
    compiled = compile_for(kernel, settings | arguments, target, options)
    block = settings.get("BLOCK") or settings["BLOCK_M"] * settings["BLOCK_N"]
    numbers = block / (warps * target.warp_size)  # per thread and step
    found = amd(compiled) if target.backend == "hip" else nvidia(compiled)
    code = found.pop("code")
    row = {"kernel": title, "variant": variant, "target": name}
    row |= {"block": block, "warps": warps, **found, "shared": compiled.metadata.shared}
    row["programs"] = resident(name, warps, row["registers"], row["shared"])
    row["loops"] = [
        {
            "instructions": round(len(loop) / numbers, 1),
            "barriers": sum(i.startswith(("BAR", "s_barrier")) for i in loop),
            "calls": sum(i.startswith(("CALL", "s_swappc")) for i in loop),
        }
        for loop in innermost_loops(code)
    ]
    return row


def launch(kernel: str, arguments: dict[str, Any], target: GPUTarget) -> dict[str, int]:
    """What a kernel is launched with on a target: compile-time values, num_warps, num_stages."""
    if kernel == "distillation":
        return triton_distillation.launch(VOCAB)
    if kernel == "add_product":
        return triton_residual.launch({BF16: torch.bfloat16, F32: torch.float32}[arguments["a_ptr"]])
    if kernel in VECTORS:
        settings = VECTORS[kernel]
    else:
        settings = tuning.launch(kernel, VOCAB, next(name for name, known in TARGETS.items() if known == target))
    return triton_rows.options(kernel, settings, target.warp_size)


def nvidia(compiled) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([tools / command[0], *command[1:], file.name], capture_output=True, text=True, check=True)
            for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    field = lambda name: int(re.search(rf"{name}:(\d+)", usage.stdout).group(1))  # noqa: E731
    return {
        "registers": field("REG"),
        "spill": field("STACK") + field("LOCAL"),
        **{
            f"{what}s": [int(vector or 1) * int(bits) for vector, bits in
                         re.findall(rf"\b{ptx}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])]
            for what, ptx in (("load", "ld"), ("store", "st"))
        },
        "code": re.sub(r"/\*[0-9a-f]{4,}\*/|@!?U?P\d+ ", "", code.stdout).splitlines(),
    }  # fmt: skip


def amd(compiled) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
    return {
        "registers": field("vgpr_count"),
        "spill": field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        **{
            f"{what}s": [{"short": 16, "byte": 8, "ubyte": 8, "ushort": 16}.get(unit) or 32 * int(n or 1) for unit, n in
                         re.findall(rf"\b(?:global|buffer)_{what}_(dword|ubyte|byte|ushort|short)(?:x(\d))?\b", text)]
            for what in ("load", "store")
        },
        "code": [line.split(";")[0] for line in text.splitlines()],
    }  # fmt: skip


def innermost_loops(code: list[str]) -> list[list[str]]:
    """The instructions of each loop that has no other inside: what lies between a label and a branch back to it."""
    instructions: list[str] = []
    at: dict[str, int] = {}
    for line in map(str.strip, code):
        if label := re.match(r"(\.L\w+):", line):
            at[label.group(1)] = len(instructions)
        elif line and line[0] not in ".#/":
            instructions.append(line)
    spans = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"(?:BRA\b|s_c?branch\w*).*?(\.L\w+)", instruction)
        if jump and at.get(jump.group(1), end) < end:
            spans.append((at[jump.group(1)], end + 1))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [instructions[slice(*span)] for span in inner]


def resident(target: str, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor (AMD: compute unit) holds at one time."""
    if target == "gfx942":  # 4 SIMDs of 512 registers per lane and 8 waves (CDNA 3 ISA guide)
        return min(4 * min(8, 512 // (-(-registers // 8) * 8)) // warps, SHARED[target] // max(shared, 1))
    by_threads = min(65_536 // (warps * 32 * -(-registers // 8) * 8), 2048 // (32 * warps), 32)
    return min(by_threads, SHARED[target] // (shared + 1024))  # 1 KB of every block's is the system's


HEADER = "| kernel | variant | target | registers | programs | instructions per number | barriers | loads, stores |"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; variants that compiled to the same are one line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({**row, "variant": row["variant"].split()[0], "loads": widest(row["loads"])}),
                          []).append(row)  # fmt: skip
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for same in groups.values():
        row = same[0]
        names = row["variant"]
        if len(same) > 1:
            out = names.split()[0]
            names = f"{out} " + ", ".join(other["variant"].removeprefix(f"{out} ") for other in same)
        spill = f", {row['spill']} B spilled" if row["spill"] else ""
        calls = f" ({of_loops(row, 'calls')} calls)" if any(loop["calls"] for loop in row["loops"]) else ""
        cells = (
            row["kernel"],
            names,
            row["target"],
            f"{row['registers']}{spill}",
            str(row["programs"]),
            of_loops(row, "instructions") + calls,
            of_loops(row, "barriers"),
            f"{widest(row['loads'])}, {widest(row['stores'])}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_loops(row: dict[str, Any], what: str) -> str:
    return " + ".join(f"{loop[what]:g}" for loop in row["loops"]) or "–"


def widest(widths: list[int]) -> str:
    """How many accesses have the greatest width: the others are a row's own few numbers."""
    return f"{widths.count(max(widths))}×{max(widths) // 8} B" if widths else "–"


def put(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the section of this version of Triton in a page, or add it at the end."""
    version = triton.__version__
    begin, end = f"<!-- aot {version}: made by `make aot TRITON={version}` -->", f"<!-- end of aot {version} -->"
    head = (
        f"**Triton {version}**, torch {torch.__version__}, blocks of {rows[0]['block']:,} and {rows[0]['warps']} warps:"
    )
    section = f"{begin}\n{head}\n\n{table(rows)}\n{end}"
    text = path.read_text(encoding="utf-8")
    if begin in text:
        before, rest = text.split(begin)
        text = before + section + rest.split(end)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--table", type=Path, metavar="FILE", help="the page with the table")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}: expected some of {', '.join(TARGETS)}")
    rows = []
    for name in options.targets or TARGETS:
        for variant in variants():
            rows.append(report(*variant, name))
            print(json.dumps(rows[-1]), flush=True)
    if options.table:
        put(options.table, rows)


if __name__ == "__main__":
    main()
