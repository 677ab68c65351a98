"""A built-in objective is one file and its twin: nothing else of the package has to know of it."""

import pytest
import torch

import srft_kernels as sk

from . import cases
from .compiling import assert_bitwise, compiled, fresh, gradients  # noqa: F401

triton = pytest.importorskip("triton")

from srft_kernels.rows.triton_objectives import twin  # noqa: E402

from .new_objective import Unlikelihood  # noqa: E402

OBJECTIVES = [Unlikelihood(), Unlikelihood(floor=0.5, kl_coef=0.2, entropy_coef=0.1)]


def columns(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.rand(n, generator=generator)  # noqa: E731
    return {"advantages": 2 * draw() - 1, "trust": draw(), "ref_logprobs": -3 * draw()}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_exact(objective, backend, passes):
    problem = cases.problem("gaussian")
    given = columns(len(problem.target))
    truth, eager = (f(problem, objective, **given) for f in (cases.truth, cases.eager))
    plan = sk.Plan(backend=backend, chunk_rows=5, passes=passes)
    cases.assert_exact(cases.ours(problem, objective, plan, **given), eager, truth)


def test_it_runs_in_one_kernel():
    code = twin(OBJECTIVES[1], {"advantages", "trust"})
    assert code.formula.__name__ == "unlikelihood" and code.numbers.floor == 0.5 and code.structure.kl_coef


def test_it_is_a_constant_of_a_compiled_call():
    x, w, target = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True), torch.arange(12)
    given = columns(12)

    def call(x, w):
        return sk.linear_loss(x, w, target, OBJECTIVES[1], **given).loss

    found, expected = compiled(call)(x, w), call(x, w)
    assert_bitwise([found], [expected])
    assert_bitwise(gradients(found, x, w), gradients(expected, x, w))


def test_its_annotations_and_options_are_told_as_those_of_the_others():
    x, w, target = torch.randn(12, 8), torch.randn(40, 8), torch.arange(12)
    with pytest.raises(ValueError, match=r"Unlikelihood\(\) needs the annotation trust: pass trust=\.\.\. shaped like"):
        sk.linear_loss(x, w, target, OBJECTIVES[0], advantages=torch.ones(12))
    with pytest.raises(TypeError, match="unknown annotation trusts: did you mean trust"):
        sk.linear_loss(x, w, target, OBJECTIVES[0], trusts=torch.ones(12), **columns(12))
    with pytest.raises(ValueError, match=r"Unlikelihood\(floor=inf\): expected a finite number"):
        Unlikelihood(floor=float("inf"))


def test_a_subclass_has_no_twin_of_its_own():
    """Its formula may be another than the one in the kernel."""

    class Mine(sk.PolicyGradient):
        def _policy(self, stats, tokens):
            return -stats.logprobs

    assert twin(Mine()) is None and twin(sk.PolicyGradient(), {"advantages"})
    x, w, target = torch.randn(12, 8), torch.randn(40, 8), torch.arange(12)
    out = [sk.linear_loss(x, w, target, Mine(), advantages=torch.ones(12), plan=sk.Plan(backend=b)) for b in
           ("torch", "triton")]  # fmt: skip
    torch.testing.assert_close(out[0].loss, sk.linear_cross_entropy(x, w, target))
    torch.testing.assert_close(out[1].loss, out[0].loss)
