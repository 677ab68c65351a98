"""docs/performance.md from JSON files: numbers, sources, and what was not measured."""

import json

import pytest

from bench import report

MACHINE = {
    "device": "NVIDIA H200",
    "kind": "cuda",
    "driver": "580.1",
    "cuda": "13.0",
    "python": "3.12.3",
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "commit": "abc123",
    "command": "make gpu",
}


def row(group: str, provider: str, **extra) -> dict:
    case = f"{group}: srft 8192×4096×151936 peaked" + (f" {extra['live']:.0%} live" if "live" in extra else "")
    info = {"case": case, "provider": provider, "ratio_to_products": 1.25, "tflops": 640.0, "peak_bytes": 2e9,
            "error": 0.003, "tokens": 8192, "vocab": 151936, "live": 1.0, "note": "", "noisy": False}  # fmt: skip
    return {"group": group, "stats": {"median": 0.0484}, "extra_info": info | extra}


def untimed(provider: str, status: str, reason: str) -> dict:
    case = "full loss: srft 8192×4096×151936 peaked"
    return {"case": case, "group": "full loss", "provider": provider, "status": status, "reason": reason, "error": 0.5}


@pytest.fixture
def page(tmp_path):
    def build(machine: dict, *rows: dict) -> str:
        (tmp_path / "results").mkdir(exist_ok=True)
        data = {
            "machine_info": machine,
            "benchmarks": list(rows),
            "untimed": [
                untimed("Fast", "wrong", "error dx 0.5 (allowed 0.1)"),
                untimed("QuACK", "unavailable", "gone"),
            ],
            "profiles": [{"case": "c", "kernels": [{"name": "gemm|x", "calls": 3, "milliseconds": 9.0, "share": 0.9}]}],
            "tests": {"tests": {"passed": True, "summary": "70 passed", "failures": []}},
        }
        (tmp_path / "results" / f"{machine['kind']}.json").write_text(json.dumps(data), encoding="utf-8")
        assert report.main(tmp_path / "results", tmp_path / "docs") == 0
        return (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")

    return build


def test_numbers_sources_and_what_is_missing(page, tmp_path):
    memory = [row("peak memory", "srft_kernels", tokens=n, peak_bytes=1e9, case=f"peak memory: {n}") for n in (1, 2, 4)]
    masked = [row("masked batches", "srft_kernels", live=live) for live in (0.1, 1.0)]
    text = page(MACHINE, row("full loss", "srft_kernels", noisy=True), *memory, *masked)
    assert "| srft_kernels | 48.4 ms | 1.25 | 640 | 2,000.0 MB | 3e-03 | noisy |" in text
    assert "| Fast | WRONG |" in text and "- QuACK: gone" in text
    source = (
        "NVIDIA H200, driver 580.1, CUDA 13.0; Python 3.12.3, torch 2.11.0, triton 3.6.0; commit abc123; `make gpu`"
    )
    assert text.count(source) >= 4  # the section and each figure
    assert "### Training step\n\nNot measured." in text and "70 passed" in text and "gemm/x" in text
    for name in ("full-loss", "peak-memory", "masked-batches"):
        assert f"](figures/cuda-{name}.svg)" in text
        drawn = (tmp_path / "docs" / "figures" / f"cuda-{name}.svg").read_text(encoding="utf-8")
        assert "580.1" in drawn and "abc123" in drawn


def test_without_a_gpu_it_says_so(page):
    text = page(MACHINE | {"kind": "cpu", "driver": "none", "device": "a CPU"}, row("scoring", "srft_kernels"))
    assert "## GPU\n\nNot measured: full loss; scoring" in text and "driver" not in text.partition("## a CPU")[2]


def test_the_same_results_make_the_same_files(page, tmp_path):
    def files() -> dict[str, bytes]:
        page(MACHINE, row("full loss", "srft_kernels"))
        return {path.name: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}

    assert files() == files()


def test_no_results_at_all(tmp_path):
    (tmp_path / "results").mkdir()
    report.main(tmp_path / "results", tmp_path / "docs")
    assert "Not measured" in (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
