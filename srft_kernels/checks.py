"""What callers get wrong, told before any work: the argument, what was found, what was expected."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from math import inf
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from . import words

Options, Function = TypeVar("Options", bound=type), TypeVar("Function", bound=Callable[..., Any])
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = ("sequence_ids", "prompt_ids")  # whose rounding would make one of two


def targets(target: Tensor, input: Tensor, linear_weight: Tensor) -> None:  # (...), (..., H), (V, H)
    """Class indices of the tokens of `input`."""
    tensor("target", target)
    untransformed("target", target)
    if target.is_floating_point() and target.shape[-1:] == linear_weight.shape[:1]:
        raise TypeError("target holds class probabilities, which are not supported: pass class indices (int64)")
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integer class indices, found {target.dtype}")
    per_token("target", target, input)


def head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> torch.dtype:
    """Hidden states (..., H) and a head for them, (V, H) and (V,); returns the type that their products run in."""
    of_input, of_weight, of_bias = names
    tensors = {of_input: input, of_weight: weight, **({} if bias is None else {of_bias: bias})}
    for name, value in tensors.items():
        tensor(name, value)
        untransformed(name, value)
        if value.dtype in FLOATING:
            continue
        # before the shape: packed numbers have another
        likely = "were it and target exchanged?" if value.dtype in (torch.int64, torch.int32) else DEQUANTISE
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, found {value.dtype}: {likely}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{of_weight} must be (V, H) and not empty, found shape {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{of_input} must be (..., H) with H = {weight.shape[1]} as in {of_weight} {tuple(weight.shape)}, "
            f"found shape {tuple(input.shape)}"
        )
    for name, value in tensors.items():
        if value.device != input.device:
            raise ValueError(f"{name} is on {value.device} but {of_input} is on {input.device}: move it there")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{of_bias} must be (V,) = ({weight.shape[0]},), found shape {tuple(bias.shape)}")
    kind = input.device.type
    narrow = all(value.dtype != torch.float64 for value in tensors.values())  # F.linear leaves others as they are
    if narrow and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    for name, value in tensors.items():
        if value.dtype != input.dtype:
            raise TypeError(f"{name} is {value.dtype} but {of_input} is {input.dtype}: cast one, or use torch.autocast")
    return input.dtype


def vocabulary(linear_weight: Tensor, vocab_size: int | None) -> int:  # (V, H)
    """The number of entries that exist."""
    rows = linear_weight.shape[0]
    if vocab_size is None:
        return rows
    if not (integer(vocab_size) and 1 <= vocab_size <= rows):
        raise ValueError(
            f"vocab_size must be an integer in [1, {rows}], the rows of linear_weight, found {vocab_size!r}"
        )
    return int(vocab_size)


def integer(value: Any) -> bool:
    """A whole number of Python's or NumPy's; True and False are none."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def positive(name: str, value: float) -> None:
    """A number that a kernel can take in fp32, and multiply and divide by."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a positive number of Python, found a tensor: pass float({name})")
    if not (isinstance(value, Real) and 0 < value < inf):
        raise ValueError(f"{name} must be a positive number, found {value!r}")
    if not 1e-30 <= float(value) <= 1e30:  # NumPy's would compare in their own type
        raise ValueError(f"{name} must lie between 1e-30 and 1e30, found {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {value!r}")


def ignore_index(value: Any) -> None:
    if not (value is None or integer(value)):
        raise TypeError(f"ignore_index must be an integer or None, found {value!r}")


def temperature(value: Any, target: Tensor, live: Tensor | None) -> None:  # (...), (...)
    """A positive number, or one of each live token; of the latter silent on accelerators, like `target_range`."""
    if not isinstance(value, Tensor):
        return positive("temperature", value)
    shaped_like("temperature", value, target)
    if not value.is_floating_point():
        raise TypeError(f"temperature must hold floating-point numbers, found {value.dtype}")
    if not may_look(target):
        return
    wrong = ~((value > 0) & (value < inf))
    if live is not None:
        wrong &= live
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(f"temperature{where} must be a positive number, found {value[tuple(where)].item():g}")


def live_tokens(value: Any) -> None:
    if value is not None and not (integer(value) and value >= 0):
        raise TypeError(f"live_tokens must be a number of tokens on the host, an int ≥ 0, found {value!r}")


def weight_grad(value: Any, linear_weight: Tensor, compute: torch.dtype) -> None:  # (V, H)
    if value is None:
        return
    tensor("weight_grad", value)
    expected = torch.float64 if compute == torch.float64 else torch.float32
    if value.shape != linear_weight.shape or value.dtype != expected or value.device != linear_weight.device:
        raise ValueError(
            f"weight_grad must be {expected}, shaped like linear_weight {tuple(linear_weight.shape)} and on "
            f"{linear_weight.device}, found {value.dtype}, {tuple(value.shape)}, {value.device}"
        )
    if not linear_weight.requires_grad:
        raise ValueError("weight_grad was given, but linear_weight does not require a gradient: drop one of the two")
    if compute == torch.float16:
        raise TypeError("weight_grad cannot take fp16 gradients, which are scaled until the backward: use bf16")


def at_most_live(live_tokens: int | None, target: Tensor, live: Tensor | None) -> None:  # (...), (...)
    """Raise for more live tokens than the caller said there are. Silent on accelerators, like `target_range`."""
    if live_tokens is None or not may_look(target):
        return
    found = target.numel() if live is None else int(live.sum())
    if found > live_tokens:
        raise ValueError(f"live_tokens={live_tokens}, but {found} targets are live: pass at least as many")


SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc, torch._mkldnn)
PLAIN = (Tensor.__torch_function__.__func__, Parameter.__torch_function__)
DEQUANTISE = (
    "packed and quantised numbers have to be made numbers again first (dequantize(), or "
    "bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state) of a Params4bit)"
)


def tensor(name: str, value: Any) -> None:
    """A tensor that is a plain block of numbers: what else is called one has another meaning, or none, for a kernel."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        advice = "to_dense()" if value.layout in SPARSE else "pass its values(), with targets and annotations alike"
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, found a {kind} one: {advice}")
    if (kind := type(value)) is Tensor or kind is Parameter or _plain(kind):
        return
    if kind.__name__ == "DTensor":
        # which Dynamo of torch 2.14 cannot trace
        how = "" if torch.compiler.is_compiling() else f" as {value.placements}"
        raise TypeError(
            f"{name} is a DTensor, divided over ranks{how}: with FSDP2, call the loss in the forward "
            "of the module that owns the weight, where it is whole and its gradient reduced (full_tensor() elsewhere "
            "would lose part of it); with a head divided over the vocabulary, pass its to_local() and group="
        )
    if kind.__name__.startswith("Uninitialized"):
        raise TypeError(f"{name} is a parameter of a lazy module, not initialised yet: run the module once before")
    raise TypeError(
        f"{name} is a {kind.__module__}.{kind.__name__}, a tensor with operations of its own, which a kernel does not "
        f"know: pass a plain tensor; {DEQUANTISE}"
    )


def untransformed(name: str, value: Tensor) -> None:  # any shape
    """Raise under torch.func: where autograd is asked, and where data are looked at, its wrappers would be lost."""
    compiling = torch.compiler.is_compiling()  # which sees through the wrappers of a transform
    if _in_transform() if compiling else torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise TypeError(f"{name} is under a transform of torch.func, which is not supported: use torch.autograd.grad")


def _plain(kind: type) -> bool:
    """Whether the operations of this class of tensors are PyTorch's own, or what they wait for or pretend is."""
    of_class = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and of_class in PLAIN:
        return True
    return kind.__module__.startswith("torch._subclasses.") or kind.__name__ == "AsyncCollectiveTensor"


@torch.compiler.assume_constant_result
def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def instance(name: str, value: Any, expected: type, advice: str) -> None:
    if not isinstance(value, expected):
        kind = expected.__name__
        raise TypeError(f"{name} must be {'an' if kind[0] in 'AEIO' else 'a'} {kind}, found {value!r}: {advice}")


def group(name: str, value: Any) -> None:
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a process group of torch.distributed that this process is in, found {value!r}: pass "
            "dist.group.WORLD, what dist.new_group returned here, or get_group() of a one-dimensional DeviceMesh"
        )
    if not dist.is_initialized():
        raise ValueError(f"{name} was given, but torch.distributed is not initialised: call init_process_group() first")


def reduction(value: Any) -> None:
    if value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', found {value!r}")


def real(value: Any) -> bool:
    """A number of Python's or NumPy's, no NaN; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def shaped_like(name: str, value: Any, like: Tensor, of: str = "target") -> None:  # (...)
    """What is told of each token: a tensor shaped like the one that is called `of`, of numbers that its name allows."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor shaped like {of} {tuple(like.shape)}, found {type(value).__name__}")
    tensor(name, value)
    if value.shape != like.shape:
        raise ValueError(f"{name} must be shaped like {of} {tuple(like.shape)}, found {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {of} is on {like.device}: move it there")
    if of == "target":
        untransformed(name, value)
    numbers(name, value)


def numbers(name: str, value: Tensor) -> None:  # (...)
    """Raise for numbers that cannot be what the name says."""
    if name in IDS and value.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers, found {value.dtype}, which may be rounded: cast them")
    if name == "mask" and value.dtype not in (torch.bool, *INTEGERS):
        raise TypeError(f"mask must be boolean, found {value.dtype}; write mask > 0")
    if name == "advantages" and value.dtype == torch.bool:
        raise TypeError("advantages must hold numbers, found torch.bool: write torch.where(value, 1.0, -1.0), say")
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, found {value.dtype}")
    if name == "is_demo" and value.is_floating_point() and may_look(value) and value.isnan().any():
        raise ValueError("is_demo holds NaN, which is neither true nor false")


def per_token(name: str, value: Any, input: Tensor) -> None:  # (..., H)
    """None, or a tensor shaped like the tokens of `input`."""
    if value is None:
        return
    tensor(name, value)
    numbers(name, value)
    if value.shape != input.shape[:-1]:
        raise ValueError(
            f"{name} must be shaped like input without its last dimension, {tuple(input.shape[:-1])}, "
            f"found {tuple(value.shape)}"
        )
    if value.device != input.device:
        raise ValueError(f"{name} is on {value.device} but input is on {input.device}: move it there")


def class_weight(weight: Tensor, vocab: int, input: Tensor) -> None:  # (V,), (..., H)
    tensor("weight", weight)
    numbers("weight", weight)
    if tuple(weight.shape) != (vocab,):
        raise ValueError(f"weight must hold one number per class, ({vocab},), found shape {tuple(weight.shape)}")
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device} but input is on {input.device}: move it there")


def target_range(target: Tensor, live: Tensor | None, vocab: int) -> None:  # (...), (...)
    """Raise for a live target outside [0, vocab). Silent on accelerators, where looking would stall the stream."""
    if not may_look(target):
        return
    wrong = (target < 0) | (target >= vocab)
    if live is not None:
        wrong &= live
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"target{where} = {target[tuple(where)].item()} lies outside [0, {vocab}) and is not ignore_index; "
            f"{int(wrong.sum())} of {target.numel()} targets do"
        )


def may_look(tensor: Tensor) -> bool:  # any shape
    """Whether there are data to look at, and nothing would have to wait for them."""
    if isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("SRFT_KERNELS_CHECK", "0") == "1"


def runs_again() -> bool:
    """Whether the forward that runs here may run a second time: a checkpoint that is not re-entrant, whoever wrote it,
    takes hold of what autograd saves. (One that is re-entrant runs first without gradients, and makes none.)"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


# ---- options of a dataclass


def told(function: Function) -> Function:
    """A function that says of an unknown option which one is meant."""
    known = set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapped(*values: Any, **named: Any) -> Any:
        try:
            return function(*values, **named)
        except TypeError as error:
            if named.keys() <= known:
                raise
            raise words.explained(f"{function.__name__}()", error, named, known) from None

    return wrapped


def options(cls: Options) -> Options:
    """A dataclass that does."""
    init = cls.__init__

    @functools.wraps(init)
    def initialise(self: Any, *values: Any, **named: Any) -> None:
        try:
            init(self, *values, **named)
        except TypeError as error:
            raise words.explained(type(self).__name__, error, named, [field.name for field in fields(self)]) from None

    cls.__init__ = initialise
    return cls


def one_of(owner: object, **choices: tuple[str, ...]) -> None:
    for field, allowed in choices.items():
        value = getattr(owner, field)
        if value not in allowed:
            raise ValueError(
                f"{type(owner).__name__}({field}={value!r}): expected one of {', '.join(map(repr, allowed))}"
            )


def finite(owner: object, *unbounded: str) -> None:
    """Options that are numbers: finite unless `unbounded`, and no tensor, at which a GPU would wait, never to learn."""
    for field in fields(owner):
        value, optional = getattr(owner, field.name), field.type == "float | None"
        if field.type not in ("float", "float | None") or (optional and value is None):
            continue
        bounded = not real(value) or field.name in unbounded or -inf < value < inf
        if not (real(value) and bounded):
            raise ValueError(
                f"{type(owner).__name__}({field.name}={value!r}): expected a {'' if bounded else 'finite '}number"
                f"{' or None' * optional}{'; of a tensor pass .item()' * isinstance(value, Tensor)}"
            )
        if type(value) not in (int, float):  # NumPy's, which no graph holds as a constant
            object.__setattr__(owner, field.name, float(value))


def within(owner: object, **ranges: tuple[float, float | None]) -> None:
    """Options in [low, high], or ≥ low; None is told by `finite` where it may not be."""
    for name, (low, high) in ranges.items():
        if (value := getattr(owner, name)) is not None and not (low <= value and (high is None or value <= high)):
            expected = f"≥ {low}" if high is None else f"in [{low}, {high}]"
            raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected a number {expected}")


def above_zero(owner: object, *names: str) -> None:
    for name in names:
        if (value := getattr(owner, name)) is not None and not value > 0:
            raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected a positive number")
