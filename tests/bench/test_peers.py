"""The adapters: those that can run here are right, those whose package is here have the signature they rely on."""

import os
import sys
import types

import pytest
import torch

from bench.cases import TASKS, Case, Shape
from bench.inputs import Unavailable, make
from bench.measure import default_dtype, measure
from bench.peers import PEERS, Changed, function, package
from bench.truth import truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN_ANYWHERE = {  # `make peers-test` installs them: there they may not be skipped
    "liger-kernel GRPO (chunked)",
    "liger-kernel scaled CE (torch)",
    "cut-cross-entropy torch_compile",
    "verl (torch)",
    "TRL chunked log-probs",
}


@pytest.mark.parametrize("provider", PEERS, ids=lambda p: p.name)
def test_a_peer_is_right_or_says_why_it_cannot_be_here(provider):
    """Changed is not caught: an installed package with another signature fails this test."""
    try:
        abilities = provider.load(DEVICE)
    except Unavailable as error:
        installed = os.environ.get("PEERS") == "installed" and DEVICE == "cpu"
        assert not (installed and provider.name in RUN_ANYWHERE), str(error)
        pytest.skip(str(error))
    did = []
    for name in ("cross entropy", "grpo", "srft", "scoring"):
        if provider.name == "torch.compile" and name != "cross entropy":
            continue  # half a minute each
        if (call := abilities.call(name)) is None:
            continue
        case = Case("full loss", name, Shape(128, 64, 1024), "peaked", live=0.75)
        inputs = make(case, DEVICE, default_dtype(DEVICE))
        reference = truth(inputs, TASKS[name])
        errors = reference.errors(call(inputs))
        assert errors and not reference.past(errors), (name, errors, reference.allowed)
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


@pytest.fixture
def gpu_only(tmp_path, monkeypatch):
    """A package whose modules can be read and not imported."""
    (tmp_path / "a_gpu_peer").mkdir()
    (tmp_path / "a_gpu_peer" / "__init__.py").write_text("raise RuntimeError('no CUDA here')\n")
    source = "import cutlass_of_the_peer\n\ndef loss(x, weight, *, target): ...\n\n"
    source += "class Function:\n    def helper(x): ...\n    def forward(ctx, x, labels): ...\n"
    (tmp_path / "a_gpu_peer" / "ops.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_signature_is_checked_where_nothing_can_be_imported(gpu_only):
    for path, parameters in (("a_gpu_peer.ops:loss", "x weight target"), ("a_gpu_peer.ops:Function", "x labels")):
        with pytest.raises(Unavailable, match="no CUDA here"):
            function(path, parameters)
    for path, parameters, told in (
        ("a_gpu_peer.ops:loss", "x labels", "expected parameters x labels, found x weight target"),
        ("a_gpu_peer.ops:Function", "x target", "expected parameters x target"),
        ("a_gpu_peer.ops:gone", "x", "has no gone any more"),
        ("a_gpu_peer.moved:loss", "x", "no module a_gpu_peer.moved any more"),
        ("a_gpu_peer_of_old.ops:loss", "x", "no package a_gpu_peer_of_old any more"),
    ):
        with pytest.raises(Changed, match=told):
            function(path, parameters)


def test_a_changed_peer_is_told_in_the_rows(peer, monkeypatch):
    from bench.providers import Provider

    def load(device):
        return function("a_peer:gone", "x")

    (row,) = measure(Case("scoring", "scoring", Shape(64, 16, 128)), [Provider("peer", load)], "cpu", rounds=1)
    assert row.status == "failed" and row.reason.startswith("Changed: ")
