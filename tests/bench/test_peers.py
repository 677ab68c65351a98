"""The adapters: those that can run here are right, those whose package is here have the signature they rely on."""

import sys
import types

import pytest
import torch

from bench.cases import TASKS, Case, Shape
from bench.inputs import Unavailable, make
from bench.measure import default_dtype, measure
from bench.peers import PEERS, Changed, function, package
from bench.truth import TOLERANCE, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("provider", PEERS, ids=lambda p: p.name)
def test_a_peer_is_right_or_says_why_it_cannot_be_here(provider):
    """Changed is not caught: an installed package with another signature fails this test."""
    try:
        abilities = provider.load(DEVICE)
    except Unavailable as error:
        pytest.skip(str(error))
    did = []
    for name in ("cross entropy", "grpo", "srft", "scoring"):
        if provider.name == "torch.compile" and name != "cross entropy":
            continue  # half a minute each
        if (call := abilities.call(name)) is None:
            continue
        inputs = make(Case("full loss", name, Shape(128, 64, 1024), "peaked"), DEVICE, default_dtype(DEVICE))
        errors = truth(inputs, TASKS[name]).errors(call(inputs))
        assert errors and max(errors.values()) <= TOLERANCE[default_dtype(DEVICE)], (name, errors)
        did.append(name)
    assert did


def test_a_package_that_is_not_installed_is_listed():
    rows = measure(Case("scoring", "scoring", Shape(64, 16, 128)), PEERS[3:], "cpu", rounds=1)
    assert {row.provider for row in rows} >= {"QuACK", "liger-kernel FLCE (Triton)"}
    with pytest.raises(Unavailable, match="no-such-peer is not installed"):
        package("no-such-peer")


@pytest.fixture
def peer(monkeypatch):
    module = types.ModuleType("a_peer")
    module.loss = lambda x, weight, target, eps=0: x
    monkeypatch.setitem(sys.modules, "a_peer", module)
    return module


def test_a_signature_is_checked(peer):
    assert function("a_peer:loss", "x weight target") is peer.loss
    assert function("a_peer:loss", "x target") is peer.loss  # others may stand between
    for path, parameters, told in (
        ("a_peer:loss", "weight x", "expected parameters weight x, found"),
        ("a_peer:loss", "x labels", "expected parameters x labels, found"),
        ("a_peer:gone", "x", "has no gone any more"),
    ):
        with pytest.raises(Changed, match=told):
            function(path, parameters)


def test_autograd_functions_are_checked_by_their_forward(peer):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x

    peer.Function = Function
    assert function("a_peer:Function", "x weight") is Function
    with pytest.raises(Changed):
        function("a_peer:Function", "x labels")


def test_a_changed_peer_is_told_in_the_rows(peer, monkeypatch):
    from bench.providers import Provider

    def load(device):
        return function("a_peer:gone", "x")

    (row,) = measure(Case("scoring", "scoring", Shape(64, 16, 128)), [Provider("peer", load)], "cpu", rounds=1)
    assert row.status == "failed" and row.reason.startswith("Changed: ")
