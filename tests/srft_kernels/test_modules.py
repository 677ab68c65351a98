"""The modules are the functions with their options fixed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import srft_kernels as sk

X, W, Y = torch.randn(2, 3, 4), torch.randn(7, 4), torch.tensor([[1, 2, -100], [0, 6, 6]])
COLUMNS = {
    "advantages": torch.randn(2, 3),
    "is_demo": torch.tensor([[True] * 3, [False] * 3]),
    "rewards": torch.ones(2, 3),
}


def test_cross_entropy():
    weight, bias = torch.rand(7), torch.rand(7)
    module = sk.LinearCrossEntropyLoss(weight, label_smoothing=0.1, softcap=3.0, reduction="none")
    expected = sk.linear_cross_entropy(
        X, W, Y, linear_bias=bias, weight=weight, label_smoothing=0.1, softcap=3.0, reduction="none"
    )
    torch.testing.assert_close(module(X, W, Y, bias), expected)
    torch.testing.assert_close(module(X, W, Y, linear_bias=bias), expected)
    assert repr(module) == "LinearCrossEntropyLoss(label_smoothing=0.1, softcap=3.0, reduction='none')"


def test_class_weight_moves_with_the_module_but_is_not_saved():
    module = sk.LinearCrossEntropyLoss(torch.ones(7)).to(torch.float64)
    assert module.weight.dtype == torch.float64 and module.state_dict() == {} and not list(module.parameters())


def test_srft():
    module = sk.SRFTLoss(temperature=0.9)
    out = module(X, W, Y, **COLUMNS)
    expected = sk.linear_loss(X, W, Y, sk.srft_paper(), temperature=0.9, **COLUMNS)
    assert out.loss == expected.loss and out.metrics.keys() == expected.metrics.keys()
    assert "SRFT(" in repr(module) and "temperature=0.9" in repr(module)


def test_srft_with_another_objective_and_overrides_in_the_call():
    module = sk.SRFTLoss(sk.srft_official(), temperature=0.9)
    expected = sk.linear_loss(X, W, Y, sk.srft_official(), temperature=0.5, **COLUMNS)
    assert module(X, W, Y, temperature=0.5, **COLUMNS).loss == expected.loss


def test_modules_can_be_copied_and_pickled():
    for module in (sk.LinearCrossEntropyLoss(torch.ones(7), z_loss=0.1), sk.SRFTLoss(sk.srft_hpt(level="token"))):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(other) == repr(module)


def test_results_can_be_copied():
    out = sk.linear_loss(X, W, Y, sk.sft())
    assert copy.copy(out).loss == out.loss
    tokens = sk.Tokens(Y.flatten(), **{name: column.flatten() for name, column in COLUMNS.items()})
    assert (copy.deepcopy(tokens).advantages == tokens.advantages).all()


def test_wrong_options_fail_when_made():
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', found 'avg'"):
        sk.LinearCrossEntropyLoss(reduction="avg")
    with pytest.raises(TypeError, match="objective is grpo itself"):
        sk.SRFTLoss(sk.grpo)
