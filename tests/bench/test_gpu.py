"""`make gpu DEVICE=cpu`: the rehearsal of a day with a GPU, on one small group."""

import json

import pytest
import torch

from bench import gpu


@pytest.mark.slow
def test_rehearsal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "OTHER_TESTS", "tests/srft_kernels/test_plan.py")
    out = tmp_path / "gpu.json"
    status = gpu.main(["--device", "cpu", "--group", "1 M", "--seconds", "240", "--out", str(out)])
    text = capfd.readouterr().out
    assert status == 0, text
    data = json.loads(out.read_text(encoding="utf-8"))
    assert {row["group"] for row in data["benchmarks"]} == {"1 M tokens"}
    row = next(row for row in data["benchmarks"] if row["extra_info"]["provider"] == "srft_kernels")
    assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 3 and row["stats"]["median"] > 0
    assert {"tflops", "ratio_to_products", "peak_bytes", "error", "noisy"} <= set(row["extra_info"])
    machine = data["machine_info"]
    assert {"device", "driver", "packages", "commit"} <= set(machine) and "node" not in machine
    assert machine["command"] == "make gpu DEVICE=cpu" and machine["packages"]["torch"] == torch.__version__
    assert [bool(p["kernels"]) for p in data["profiles"]] == [True, True]
    assert data["tests"][gpu.DEVICE_TESTS]["passed"]
    assert "best peer" in text and "profile of" in text and "scaled down" in text


def test_no_time_is_told_as_skipped(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu, "bench", lambda *_: {"benchmarks": [], "untimed": [], "machine_info": {}})
    assert gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "out.json")]) == 1
    assert "skipped: no time left" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_to_do(capsys):
    assert gpu.main(["--device", "cuda"]) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err
