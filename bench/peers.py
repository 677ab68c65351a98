"""The peers, each called from its own package. One function per peer: it imports, checks signatures, adapts.

A peer that is not installed, or cannot run on this device, raises Unavailable and is listed as such. One whose function
has another name or other parameters than those used here raises Changed: an adapter that guesses measures nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import SEQUENCE, Inputs, Unavailable
from .providers import Abilities, Provider


class Changed(Exception):
    """An installed peer no longer has the function or the parameters that its adapter uses."""


def package(name: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{name} is not installed") from None


def function(path: str, parameters: str) -> Any:
    """`module:name` or `module:Class`, whose call (for autograd functions and modules: `forward`) takes `parameters`.

    They must be there in this order; others may stand between or behind them. Where the module cannot be imported, for
    want of CUDA or of a package, its source is read instead: Changed comes before Unavailable.
    """
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # packages for GPUs fail in many ways without one
        expect(path, parameters, parameters_in_source(path))
        if isinstance(error, ModuleNotFoundError):
            raise Unavailable(f"{module_name} needs {error.name}, which is not installed") from error
        raise Unavailable(f"{module_name} cannot be imported: {str(error).strip()[:200]}") from error
    found = getattr(module, name, None)
    if found is None:
        raise Changed(f"{path}: the module has no {name} any more")
    call = found
    if inspect.isclass(found):
        call = next(getattr(found, method) for method in CALLED if hasattr(found, method))
    expect(path, parameters, list(inspect.signature(call).parameters))
    return found


CALLED = ("forward", "apply")  # of an autograd function or a module; of a class that only chooses between such


def expect(path: str, parameters: str, found: list[str]) -> None:
    has = iter(found)
    if not all(wanted in has for wanted in parameters.split()):
        raise Changed(f"{path}: expected parameters {parameters}, found {' '.join(found)}")


def parameters_in_source(path: str) -> list[str]:
    """Names of the parameters of a function, or of a class's call, from the file that defines it. Raises Changed."""
    module_name, name = path.split(":")
    top, *inner = module_name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise Changed(f"{path}: there is no package {top} any more")
    place = Path(spec.submodule_search_locations[0], *inner)
    file = next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)
    if file is None:
        raise Changed(f"{path}: there is no module {module_name} any more")
    defined = {node.name: node for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    if (found := defined.get(name)) is None:
        raise Changed(f"{path}: the module has no {name} any more")
    if isinstance(found, ast.ClassDef):
        methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
        found = next(methods[method] for method in CALLED if method in methods)
    return [argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]


def need(device: str, capability: tuple[int, int] | None = None) -> None:
    if not device.startswith("cuda"):
        raise Unavailable(f"cannot run on {device}: needs CUDA")
    if capability and torch.cuda.get_device_capability() != capability:
        raise Unavailable(f"needs compute capability {capability[0]}.{capability[1]}")


# ------------------------------------------------------------------------------------------------------------- torch


def full_logits(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """ℓ and H as one writes them: `.float()` after the projection."""
    logp = F.linear(x, weight).float().log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def full_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def cross_entropy_of(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Callable]:
    """A mean cross-entropy f(x, W, target) as the losses it can stand for."""

    def loss(inputs: Inputs, task: Any) -> Tensor:
        return f(inputs.input, inputs.weight, inputs.target)

    return {"cross entropy": loss, "frozen head": loss}


def eager(device: str) -> Abilities:
    return Abilities(cross_entropy_of(full_cross_entropy), full_logits)


def compiled(device: str) -> Abilities:
    torch._dynamo.reset()  # each case its own shapes: no generic code from the one before
    return Abilities(cross_entropy_of(torch.compile(full_cross_entropy)), torch.compile(full_logits))


def torch_linear_cross_entropy(device: str) -> Abilities:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    call = function("torch.nn.functional:linear_cross_entropy", "input linear_weight target reduction options")
    options = torch.nn.LinearCrossEntropyOptions()
    return Abilities(cross_entropy_of(lambda x, w, y: call(x, w, y, options=options)))


# ------------------------------------------------------------------------------------------------------ liger-kernel


def liger_triton(device: str) -> Abilities:
    package("liger-kernel")
    path = "liger_kernel.transformers.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyLoss"
    loss = function(path, "lin_weight _input target")()
    need(device)
    return Abilities(cross_entropy_of(lambda x, w, y: loss(w, x, y)))


def liger_grpo(device: str) -> Abilities:
    """Its "dapo" average is the mean over live tokens; advantages are one number per sequence."""
    package("liger-kernel")
    path = "liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOLoss"
    module = function(path, "_input lin_weight selected_token_ids attention_mask advantages")
    loss = module(beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2)

    def grpo(inputs: Inputs, task: Any) -> Tensor:
        x = inputs.input.view(-1, SEQUENCE, inputs.input.shape[1])
        live = inputs.live
        target = torch.where(live, inputs.target, 0).view(-1, SEQUENCE)
        advantages = inputs.columns["advantages"].view(-1, SEQUENCE)[:, 0]
        return loss(x, inputs.weight, target, live.view(-1, SEQUENCE).float(), advantages)[0]

    return Abilities({"grpo": grpo})


LIGER_SCALED = "_input weight target temperature ignore_index return_entropy"


def liger_scaled(device: str) -> Abilities:
    package("liger-kernel")
    f = function("liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction", LIGER_SCALED)

    def statistics(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = f.apply(x, weight, target, return_entropy=True)
        return -nll, entropy

    return Abilities(statistics=statistics)


def liger_cute(device: str) -> Abilities:
    found = liger_scaled(device)
    path = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90:LigerFusedScaledCrossEntropySM90Function"
    function(path, LIGER_SCALED)  # what the package imports on the first call
    need(device, (9, 0))
    return found


def liger_torch(device: str) -> Abilities:
    found = liger_scaled(device)
    if device.startswith("cuda") and torch.cuda.get_device_capability() == (9, 0):
        raise Unavailable("on this GPU the package takes its CuTe form")
    return found


def liger_native(device: str) -> Abilities:
    """The tensor-parallel form over a group of one: the only one that its native kernels have."""
    package("liger-kernel")
    native = function("liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp:is_available", "")
    path = "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyTPFunction"
    f = function(path, "_input weight target tp_group temperature ignore_index tiles_per_reduce return_entropy")
    package("liger-cute-kernels")
    need(device)
    if torch.cuda.get_device_capability() != (9, 0) and torch.cuda.get_device_capability()[0] != 10:
        raise Unavailable("needs compute capability 9.0 or 10.x")
    if not native():  # the package would silently take its fallback in torch
        raise Unavailable("its native kernels cannot be loaded")
    import torch.distributed as dist
    from liger_cute_kernels import nvshmem

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    nvshmem.resolve_team(dist.group.WORLD)

    def statistics(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = f.apply(x, weight, target, dist.group.WORLD, return_entropy=True)
        return -nll, entropy

    return Abilities(statistics=statistics)


# ---------------------------------------------------------------------------------------------- cut-cross-entropy


def cce(exact: bool | None) -> Callable[[str], Abilities]:
    """exact: False `cce`, which skips small gradients; True every gradient; None the package's torch path."""

    def load(device: str) -> Abilities:
        package("cut-cross-entropy")
        call = function("cut_cross_entropy:linear_cross_entropy", "e c targets ignore_index reduction filter_eps impl")
        if exact is None:
            options = {"impl": "torch_compile"}
        elif not exact:
            options = {"impl": "cce"}
        elif hasattr(sys.modules["cut_cross_entropy"].LinearCrossEntropyImpl, "CCE_EXACT"):
            options = {"impl": "cce_exact"}
        else:  # before there was a name for it
            options = {"impl": "cce", "filter_eps": None}
        if exact is not None:
            need(device)
        return Abilities(cross_entropy_of(lambda x, w, y: call(x, w, y, **options)))

    return load


# ------------------------------------------------------------------------------------------------------------- QuACK


def quack(device: str) -> Abilities:
    package("quack-kernels")
    path = "quack.linear_cross_entropy:chunked_linear_cross_entropy"
    call = function(path, "x weight target chunk_size ignore_index reduction")
    need(device)
    return Abilities(cross_entropy_of(lambda x, w, y: call(x, w, y)))


# -------------------------------------------------------------------------------------------------------------- verl


def bare_package(name: str) -> None:
    """Let submodules of a package be imported without its `__init__`, which in verl pulls in Ray and more."""
    if name not in sys.modules and (spec := importlib.util.find_spec(name)):
        sys.modules[name] = importlib.util.module_from_spec(spec)


def verl(device: str) -> Abilities:
    package("verl")
    bare_package("verl")
    bare_package("verl.utils")
    path = "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy"
    f = function(path, "hidden weight labels temperature reduction")
    function(
        "verl.utils.kernel.kernels:efficient_entropy_forward", "hidden weight labels"
    )  # imported on the first call
    need(device)
    return Abilities(statistics=lambda x, w, y: f.apply(x, w, y, 1.0, "none"))


def verl_torch(device: str) -> Abilities:
    package("verl")
    bare_package("verl")
    bare_package("verl.utils")
    path = "verl.utils.experimental.torch_functional:FusedLinearForPPO"
    f = function(path, "hidden_states vocab_weights input_ids temperature")()
    return Abilities(statistics=f)


# --------------------------------------------------------------------------------------------------------------- TRL


def trl(device: str) -> Abilities:
    package("trl")
    parameters = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
    f = function("trl.kernels.chunked_logprob:ChunkedLogProbFunction", parameters)
    function("trl.trainer.utils:maybe_gather_lm_head_ctx", "params")  # its backward imports it
    chunk = getattr(sys.modules["trl.trainer.utils"], "_CHUNKED_LOGPROB_CHUNK_SIZE", None)
    if chunk is None:
        raise Changed("trl.trainer.utils has no _CHUNKED_LOGPROB_CHUNK_SIZE any more")

    def statistics(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return f.apply(x, weight, None, target, 1.0, chunk, None, 1.0, ("entropy",))[:2]

    return Abilities(statistics=statistics, compacts=device.startswith("cuda"))  # elsewhere it scores every position


PEERS = [
    Provider("eager", eager),
    Provider("torch.compile", compiled),
    Provider("F.linear_cross_entropy", torch_linear_cross_entropy),
    Provider("liger-kernel FLCE (Triton)", liger_triton),
    Provider("liger-kernel GRPO (chunked)", liger_grpo),
    Provider("liger-kernel scaled CE (CuTe)", liger_cute),
    Provider("liger-kernel scaled CE (native)", liger_native),
    Provider("liger-kernel scaled CE (torch)", liger_torch),
    Provider("cut-cross-entropy cce", cce(exact=False)),
    Provider("cut-cross-entropy cce_exact", cce(exact=True)),
    Provider("cut-cross-entropy torch_compile", cce(exact=None)),
    Provider("QuACK", quack),
    Provider("verl (Triton)", verl),
    Provider("verl (torch)", verl_torch),
    Provider("TRL chunked log-probs", trl),
]
