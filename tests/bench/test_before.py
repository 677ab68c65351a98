"""This commit's package against itself, under another name."""

import subprocess

import pytest

import srft_kernels
from bench import before
from bench.cases import Shape
from bench.environment import ROOT

REPOSITORY = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not REPOSITORY, reason="no repository")


def test_calls_of_two_packages_take_turns(tmp_path, monkeypatch):
    monkeypatch.setitem(before.SHAPES, "cpu", (Shape(8, 16, 128),))
    package = before.package_at("HEAD", str(tmp_path))
    assert package is not srft_kernels and package.linear_loss.__module__ == "srft_kernels_before.functional"
    found = before.compare(package, "cpu", 0.05)
    assert [what for what, *_ in found] == ["sft 8×16×128", "srft_paper 8×16×128"]
    assert all(rounds >= 6 and 0.1 < ratio < 10 for _, rounds, ratio, _ in found)


def test_a_commit_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["before", "no-such-commit"])
    with pytest.raises(SystemExit):
        before.main()
    assert "no srft_kernels at no-such-commit: fatal: not a valid object name" in capsys.readouterr().err
