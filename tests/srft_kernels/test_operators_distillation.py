"""Compiled distillation: one graph, for any number of tokens, and bitwise what eager calls give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import srft_kernels as sk

from .compiling import assert_bitwise, compiled, fresh, gradients  # noqa: F401

H, TEACHER, V = 8, 6, 40
OPTIONS = {
    "forward": {"softcap": 5.0, "vocab_size": V - 3},
    "reverse": {"divergence": "reverse_kl", "temperature": 2.0, "teacher_temperature": 0.5},
    "jensen_shannon": {"divergence": "jensen_shannon", "beta": 0.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.7},
    "small chunks": {"plan": sk.Plan(chunk_rows=5, block_rows=2)},
    "batch-invariant": {"plan": sk.Plan(chunk_rows=5, batch_invariant=True, compact=False)},
}


def inputs(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """(x, W and b; the teacher's; mask and token weights)."""
    g = torch.Generator().manual_seed(0)
    shapes = [(n, H), (V, H), (V,), (n, TEACHER), (V, TEACHER), (V,)]
    tensors = [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    return tensors[:3], tensors[3:], {"mask": torch.arange(n) % 5 != 1, "token_weight": torch.rand(n, generator=g)}


def distil(x: Tensor, w: Tensor, b: Tensor | None, teacher: list[Tensor], **options) -> tuple[Tensor, Tensor]:
    out = sk.linear_distillation(x, w, *teacher[:2], linear_bias=b, teacher_bias=teacher[2], **options)
    return 3 * out.loss, out.divergence


@pytest.mark.parametrize("name", OPTIONS)
def test_loss(name):
    student, teacher, columns = inputs()
    options = OPTIONS[name] | columns
    expected, found = distil(*student, teacher, **options), compiled(distil)(*student, teacher, **options)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], *student), gradients(expected[0], *student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    student, teacher, columns = inputs(dtype=dtype)
    expected, found = distil(*student, teacher, **columns), compiled(distil)(*student, teacher, **columns)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], *student), gradients(expected[0], *student))


def test_any_shape_of_tokens_and_autocast():
    (x, w, _), teacher, _ = inputs()
    w = w.detach().bfloat16().requires_grad_()  # which could not be multiplied otherwise
    x, teacher[0] = x.detach().reshape(3, 4, H).requires_grad_(), teacher[0].detach().reshape(3, 4, TEACHER)

    def call(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return distil(x, w, None, teacher)

    found, expected = compiled(call)(x, w), call(x, w)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], x, w), gradients(expected[0], x, w))


def test_what_wants_no_gradient():
    (x, w, b), teacher, _ = inputs()
    found, expected = compiled(distil)(x, w.detach(), b, teacher), distil(x, w.detach(), b, teacher)
    assert_bitwise(gradients(found[0], x, b), gradients(expected[0], x, b))
    constants = x.detach(), w.detach(), b.detach()  # and the teacher, which never wants one
    assert_bitwise(compiled(distil)(*constants, teacher), distil(*constants, teacher))
    with torch.no_grad():
        found = compiled(distil)(x, w, b, teacher)
    assert not found[0].requires_grad
    assert_bitwise(found, [value.detach() for value in expected])


def test_any_number_of_tokens_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(distil, backend=counter)
    for n in (12, 13, 20, 31):
        student, teacher, columns = inputs(n)
        found, expected = graph(*student, teacher, **columns), distil(*student, teacher, **columns)
        assert_bitwise(found, expected)
        assert_bitwise(gradients(found[0], *student), gradients(expected[0], *student))
    assert counter.frame_count <= 2


def test_a_changed_option_is_seen():
    student, teacher, _ = inputs()
    graph = compiled(distil)
    for options in ({"temperature": 2.0}, {"temperature": 3.0}, {"temperature": 4.0}, {"divergence": "reverse_kl"}):
        assert_bitwise(graph(*student, teacher, **options), distil(*student, teacher, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"mask": torch.ones(5) > 0}, "mask must be shaped like input"),
        ({"mask": "all"}, "mask must be a tensor, found str"),
        ({"softcap": torch.tensor(5.0)}, "softcap must be a constant of Python in a compiled call, found Tensor"),
    ],
)
def test_bad_arguments_get_their_message(options, message):
    student, teacher, _ = inputs()
    with pytest.raises(Exception, match=message):
        compiled(distil)(*student, teacher, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
def test_the_operator_is_well_registered(wanted, dtype):
    """Schema, fake implementation, autograd and AOT dispatch."""
    from srft_kernels.distillation.engine import DistillationArguments
    from srft_kernels.operators import trace

    student, teacher, columns = inputs(dtype=dtype)
    student = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(student, wanted)]
    given = dict(zip(("input", "linear_weight", "linear_bias"), student), **columns)
    given |= dict(zip(("teacher_input", "teacher_weight", "teacher_bias"), [tensor.detach() for tensor in teacher]))
    arguments = DistillationArguments.of({**given, "teacher_logit_scale": 0.7})
    operands = trace._operands(arguments, "divergence")
    torch.library.opcheck(torch.ops.srft_kernels.distillation, operands)
