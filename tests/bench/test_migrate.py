"""docs/migrate.md runs: every change it shows and every row of its tables, with the peer and without it.

Either side's values and gradients are compared with what a section stands for, written in fp64 with full logits. A peer
that is not installed is skipped, and so is what needs a GPU where there is none. `make peers-test` installs them all.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import srft_kernels as sk
from bench.peers import bare_package

PAGE = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text(encoding="utf-8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERL_TRITON = "verl.utils.kernel.linear_cross_entropy"
BLOCKS = [  # of the page, in its order: the module that goes, and what `formula` computes of it
    ("liger_kernel.transformers", {"z_loss": 1e-4, "label_smoothing": 0.1}),
    ("trl.kernels", {"temperature": 0.7, "softcap": 30.0, "logit_scale": 0.5}),
    (VERL_TRITON, {"temperature": 0.7, "biased": False}),
    ("verl.utils.experimental.torch_functional", {"temperature": 0.7, "biased": False}),
    ("cut_cross_entropy", {"softcap": 30.0, "shift": True, "biased": False}),
    ("torch.nn.functional", {"label_smoothing": 0.1}),
    ("torch.nn.functional", {"reduction": "sum"}),
]


def blocks() -> list[tuple[list[str], list[str]]]:
    """(lines before, lines after) of each change."""
    found = [block.splitlines() for block in re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)]
    return [tuple([line[1:] for line in block if line[:1] != mark] for mark in "+-") for block in found]


def rows(peer: str) -> list[tuple[str, str]]:
    """(option, what replaces it) from the tables under a heading that begins with `peer`."""
    section = re.search(rf"^## {peer}: .*?(?=^## )", PAGE, flags=re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^\| `(.+?)` \| `?(.+?)`? \|$", section, flags=re.MULTILINE)


def problem(shift: bool = False, ignored: int = -100) -> dict[str, Tensor]:
    """The page's names. Tokens are flat unless they are to be shifted; `labels` are targets without ignored ones."""
    make = torch.Generator().manual_seed(5)
    hidden = torch.randn(24, 128, generator=make)
    weight, bias = 0.3 * torch.randn(200, 128, generator=make), torch.randn(200, generator=make)
    labels = torch.randint(200, (24,), generator=make)
    labels[::2] = (hidden @ weight.T + bias).argmax(-1)[::2]
    target = labels.clone()
    target[[2, 11, 17]] = ignored
    names = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "target": target}
    if shift:
        names.update(hidden=hidden.view(2, 12, -1), target=target.view(2, 12))
    names["class_weight"] = torch.rand(200, generator=make)
    names = {name: tensor.to(DEVICE) for name, tensor in names.items()}
    return {name: t.requires_grad_(name in ("hidden", "weight", "bias")) for name, t in names.items()}


def formula(
    names: dict[str, Tensor],
    *,
    labels: bool = False,
    biased: bool = True,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    **cross_entropy,
) -> dict[str, Tensor]:
    """loss, logprobs, entropy and arg-max in fp64 from all logits."""
    x, w, b = (names[name].double() for name in ("hidden", "weight", "bias"))
    y = names["labels" if labels else "target"]
    if shift:
        x, y = x[:, :-1], y[:, 1:]
    z = logit_scale * (x @ w.T + (b if biased else 0))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z, y = (z / temperature).flatten(0, -2), y.flatten()
    logp = z.log_softmax(-1)
    live = y != cross_entropy.get("ignore_index", -100)
    if "weight" in cross_entropy:
        cross_entropy["weight"] = cross_entropy["weight"].double()
    lse = torch.where(live, z.logsumexp(-1).square(), 0)
    penalty = {"none": lse, "sum": lse.sum(), "mean": lse.sum() / live.sum()}[reduction]
    return {
        "loss": F.cross_entropy(z, y, reduction=reduction, **cross_entropy) + z_loss * penalty,
        "logprobs": logp.gather(1, y.clamp(min=0)[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "argmax": torch.where(live, z.argmax(-1), -1),
    }


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], names: dict[str, Tensor]) -> None:
    """Values, to some roundings of logits that reach 15, 1e-6 each; and gradients for arbitrary upstream ones."""
    parameters = [names[name] for name in ("hidden", "weight", "bias")]
    gradients = []
    for results in (found, {name: expected[name] for name in found}):
        upstream = torch.Generator().manual_seed(6)
        total = 0
        for value in results.values():
            cotangent = torch.randn(value.shape, generator=upstream).to(value)
            total = total + (value * cotangent).sum()
        gradients.append(torch.autograd.grad(total, parameters, allow_unused=True))
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def executed(lines: list[str], names: dict[str, Tensor]) -> dict[str, Tensor]:
    scope: dict = dict(names)
    exec("\n".join(lines), scope)
    return {name: scope[name] for name in ("loss", "logprobs", "entropy") if name in scope}


def need(module: str) -> None:
    """Skips where the peer cannot be here; what `make peers-test` installs may not be missing."""
    top = module.split(".")[0]
    try:
        if top == "verl":
            bare_package("verl")
            bare_package("verl.utils")
        importlib.import_module(module)
    except ImportError as error:
        assert os.environ.get("PEERS") != "installed", str(error)
        pytest.skip(f"{top} is not installed")
    if module == "torch.nn.functional" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")


def case(index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, options = BLOCKS[index]
    names = problem(options.get("shift", False))
    return names, formula(names, labels=module.split(".")[0] in ("trl", "verl"), **options)


def test_each_change_is_one_line():
    found = blocks()
    assert len(found) == len(BLOCKS)
    for (before, after), (module, _) in zip(found, BLOCKS):
        assert re.match(rf"(from|import) {re.escape(module)} ", before[0]) and after[0] == "import srft_kernels as sk"
        assert len(before) == len(after) == 3 and before[1] == after[1] == ""


every_block = pytest.mark.parametrize("index", range(len(BLOCKS)), ids=[f"{i} {m}" for i, (m, _) in enumerate(BLOCKS)])


@every_block
def test_after(index):
    names, expected = case(index)
    compare(executed(blocks()[index][1], names), expected, names)


@every_block
def test_before(index, monkeypatch):
    module, _ = BLOCKS[index]
    need(module)
    if module == VERL_TRITON and DEVICE == "cpu":  # its signature, and the values of its form in PyTorch
        triton_form = importlib.import_module(module)
        torch_form = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
        signature = inspect.signature(functools.partial(triton_form.LinearCrossEntropy.forward, None))

        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            assert given.pop("reduction", "none") == "none" and isinstance(given["temperature"], float)
            hidden, weight, labels, temperature = (given[k] for k in ("hidden", "weight", "labels", "temperature"))
            return torch_form(hidden, weight, labels, temperature=temperature)

        monkeypatch.setattr(triton_form, "linear_cross_entropy", call)
    if module == "cut_cross_entropy" and DEVICE == "cpu":  # its own kernels are for GPUs
        cce = importlib.import_module(module)
        monkeypatch.setattr(
            cce, "linear_cross_entropy", functools.partial(cce.linear_cross_entropy, impl="torch_compile")
        )
        torch.compiler.set_stance("force_eager")  # what it computes, not what a compiler makes of it
    names, expected = case(index)
    try:
        compare(executed(blocks()[index][0], names), expected, names)
    finally:
        torch.compiler.set_stance("default")


LIGER, TRL, GRPO = rows("Liger"), rows("TRL"), rows("Liger and TRL")


def test_every_row_of_the_packages_tables_is_run():
    """11 options of Liger, 2 outputs of TRL, 12 arguments of GRPO: a row that `rows` cannot read would be no test."""
    assert (len(LIGER), len(TRL), len(GRPO)) == (11, 2, 12)
    tables = PAGE[PAGE.index("## Liger:") : PAGE.index("## Heads that are")]
    assert len(re.findall(r"^\| .+ \|$", tables, flags=re.MULTILINE)) == 11 + 2 + 12 + 4  # the heads of four tables


def of_row(option: str) -> dict[str, Tensor]:
    return problem(ignored=int(option.split("=")[1]) if option.startswith("ignore_index") else -100)


def of_liger_row(option: str, names: dict[str, Tensor]) -> Tensor:
    """What a row stands for, in fp64."""
    name, value = option.split("=", 1)
    if name == "ignore_index":
        return formula(names, ignore_index=int(value))["loss"]
    plain = formula(names)
    live = names["target"] != -100
    if name == "use_token_scaling":
        return -(torch.where(live, plain["logprobs"].detach().exp() * plain["logprobs"], 0)).sum() / live.sum()
    if name == "return_token_accuracy":
        return (plain["argmax"] == names["target"])[live].double().mean()
    if name == "return_predicted_tokens":
        return plain["argmax"]
    if name == "accum_dtype":
        return plain["loss"]
    known = {"lse_square_scale": "z_loss", "ce_weight": "weight"}
    return formula(names, **{known.get(name, name): eval(value, dict(names))})["loss"]


def compare_one(found: Tensor, expected: Tensor, names: dict[str, Tensor]) -> None:
    if expected.requires_grad:
        compare({"loss": found}, {"loss": expected}, names)
    else:
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("option, here", LIGER, ids=[option for option, _ in LIGER])
def test_option_of_liger_here(option, here):
    names = of_row(option)
    scope = {"sk": sk, **names}
    if here.startswith("sk."):
        found = eval(here, scope)
    else:
        options = {} if here == "nothing" else eval(f"dict({here})", scope)
        found = sk.linear_cross_entropy(
            names["hidden"], names["weight"], names["target"], linear_bias=names["bias"], **options
        )
    compare_one(found, of_liger_row(option, names), names)


@pytest.fixture
def compiled_semantics(monkeypatch):
    """What the interpreter lacks for Liger's kernel: floats as fp32 scalars, which have `.to`, and libdevice's tanh."""
    need("liger_kernel.transformers")
    if DEVICE == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import cross_entropy
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(arg):
        if not isinstance(arg, float):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(cross_entropy, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.parametrize("option", [option for option, _ in LIGER])
def test_option_of_liger_there(option, compiled_semantics):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    names = of_row(option)
    loss = LigerFusedLinearCrossEntropyLoss(**eval(f"dict({option})", {"torch": torch, **names}))
    found = loss(names["weight"], names["hidden"], names["target"], names["bias"])
    if option.startswith("return_"):
        found = getattr(found, option.removeprefix("return_").removesuffix("=True"))
    compare_one(found, of_liger_row(option, names), names)


@pytest.mark.parametrize("output, here", TRL, ids=[output for output, _ in TRL])
def test_output_of_trl(output, here):
    names = problem()
    plain = formula(names, labels=True)
    expected = {'"entropy"': plain["entropy"], '"is_top1"': plain["argmax"] == names["labels"]}[output]
    torch.testing.assert_close(eval(here, {"sk": sk, **names}).to(expected.dtype), expected, rtol=1e-5, atol=1e-5)
    need("trl.kernels")
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

    inputs = (names[name] for name in ("hidden", "weight", "bias", "labels"))
    there = ChunkedLogProbFunction.apply(*inputs, 1.0, 32768, None, 1.0, (name := output.strip('"'),))
    found = there[1 + OPTIONAL_OUTPUTS.index(name)]
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


def grpo_problem() -> dict[str, Tensor]:
    """Sequences of which one is masked out, and log-probs that clips on both sides see."""
    names = problem()
    names["hidden"] = names["hidden"].detach().view(4, 6, -1).requires_grad_()
    names["target"] = names["labels"].view(4, 6)
    names["mask"] = torch.arange(6, device=DEVICE) < torch.tensor([[6], [4], [0], [2]], device=DEVICE)
    names["advantages"] = torch.tensor([1.0, -0.5, 2.0, -1.5], device=DEVICE)
    exact = formula({**names, "target": names["target"]})["logprobs"].view(4, 6).detach().float()
    noise = torch.Generator().manual_seed(7)
    names["old"], names["ref"] = (exact + 0.3 * torch.randn(4, 6, generator=noise).to(DEVICE) for _ in range(2))
    return names


def grpo_here(here: str, names: dict[str, Tensor], loss_of=sk.linear_loss) -> Tensor:
    """As the page has it; in the type of the hidden states."""
    mask, given = names["mask"], {}
    ids = torch.arange(len(mask), device=DEVICE)[:, None].expand_as(mask)
    row = eval(f"dict({here})", {"sk": sk, "mask": mask, "ids": ids})
    given = {"token_weight": sk.token_mean(mask), "advantages": names["advantages"][:, None].expand_as(mask)}
    if row["objective"].kl_coef:
        given["ref_logprobs"] = names["ref"]
    target = names["target"].masked_fill(~mask, -100)
    return loss_of(names["hidden"], names["weight"], target, linear_bias=names["bias"], old_logprobs=names["old"],
                   **{**given, **row}).loss  # fmt: skip


def gradients_of(loss: Tensor, names: dict[str, Tensor]) -> list[Tensor]:
    return [g.float() for g in torch.autograd.grad(loss, [names[name] for name in ("hidden", "weight", "bias")])]


@pytest.mark.parametrize("option, here", GRPO, ids=[option for option, _ in GRPO])
def test_argument_of_grpo(option, here):
    names = grpo_problem()
    found, own = (loss := grpo_here(here, names)).double(), gradients_of(loss, names)
    exact = {name: names[name].detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
    expected = grpo_here(here, {**names, **exact}, sk.reference.linear_loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(own, gradients_of(expected, exact)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    need("liger_kernel.chunked_loss")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"beta": 0.0, "compiled": False, **eval(f"dict({option})")}
    there, _ = LigerFusedLinearGRPOLoss(**options)(
        names["hidden"], names["weight"], names["target"], names["mask"], names["advantages"], names["bias"],
        ref_per_token_logps=names["ref"], old_per_token_logps=names["old"],
    )  # fmt: skip
    torch.testing.assert_close(there.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(own, gradients_of(there, names)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_different_from_all_of_them():
    names = problem()
    x, w, b, y = (names[name] for name in ("hidden", "weight", "bias", "target"))
    temperature = torch.linspace(0.5, 2, len(y), device=DEVICE)
    stats = sk.linear_logprobs(*(t.bfloat16() for t in (x, w)), y, linear_bias=b.bfloat16(), temperature=temperature)
    for field in stats.fields():
        assert field.dtype == torch.float32 and (field[y == -100] == 0).all()
    nothing = sk.linear_cross_entropy(x, w, torch.full_like(y, -100))
    nothing.backward()
    assert nothing == 0 and (x.grad == 0).all() and (w.grad == 0).all()
