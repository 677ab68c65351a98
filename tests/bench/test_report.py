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
            "error": 0.003, "errors": {"dW others": 0.001},
            "task": "srft", "tokens": 8192, "hidden": 4096, "vocab": 151936, "live": 1.0, "note": "",
            "noisy": False}  # fmt: skip
    return {"group": group, "stats": {"median": 0.0484}, "extra_info": info | extra}


def untimed(provider: str, status: str, reason: str) -> dict:
    case = "full loss: srft 8192×4096×151936 peaked"
    return {"case": case, "group": "full loss", "provider": provider, "status": status, "reason": reason, "error": 0.5}


@pytest.fixture
def page(tmp_path):
    def build(machine: dict, *rows: dict, files: tuple = (), **more) -> str:
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
        } | more
        (tmp_path / "results" / f"{machine['kind']}.json").write_text(json.dumps(data), encoding="utf-8")
        assert report.main(files, tmp_path / "results", tmp_path / "docs") == 0
        return (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")

    return build


def test_numbers_sources_and_what_is_missing(page, tmp_path):
    memory = [row("peak memory", "srft_kernels", tokens=n, peak_bytes=1e9, case=f"peak memory: {n}") for n in (1, 2, 4)]
    masked = [row("masked batches", "srft_kernels", live=live) for live in (0.1, 1.0)]
    text = page(MACHINE, row("full loss", "srft_kernels", noisy=True), *memory, *masked)
    assert "| srft_kernels | 48.4 ms | 1.25 | 640 | 2,000.0 MB | 3e-03 | 1e-03 | noisy |" in text
    assert "| Fast | WRONG | | | | | | | error dx 0.5 (allowed 0.1) |" in text and "- QuACK: gone" in text
    assert "| SRFT in one pass, 8192×4096×151936: share of the products | ≥ 0.92 | 0.80 | NOT MET, noisy |" in text
    source = (
        "NVIDIA H200, driver 580.1, CUDA 13.0; Python 3.12.3, torch 2.11.0, triton 3.6.0; commit abc123; `make gpu`"
    )
    assert text.count(source) >= 4  # the section and each figure
    assert "### Training step\n\nNot measured." in text and "70 passed" in text and "gemm/x" in text
    for name in ("full-loss", "peak-memory", "masked-batches"):
        assert f"](figures/cuda-{name}.svg)" in text
        drawn = (tmp_path / "docs" / "figures" / f"cuda-{name}.svg").read_text(encoding="utf-8")
        for named in ("NVIDIA H200", "580.1", "13.0", "3.12.3", "2.11.0", "3.6.0", "abc123", "make gpu"):
            assert named in drawn, (name, named)


@pytest.fixture
def figures(page, monkeypatch):
    """The matplotlib figures of a page, laid out, by group."""
    pyplot = pytest.importorskip("matplotlib.pyplot")

    def draw(*rows: dict) -> dict:
        kept: list = []
        with monkeypatch.context() as patch:
            patch.setattr(pyplot, "close", kept.append)
            page(MACHINE, *rows)
        for figure in kept:
            figure.draw_without_rendering()
            pyplot.close(figure)
        return {figure.axes[0].get_title().partition(",")[0]: figure for figure in kept}

    return draw


def test_one_slow_bar_leaves_the_others_readable(figures):
    times = {"srft_kernels": 1.25, "eager": 1.5, "torch.compile": 1.4, "slow": 18.96}
    figure = figures(*(row("full loss", name, ratio_to_products=times[name]) for name in times))["full loss"]
    ax = figure.axes[0]
    ours, _, _, slow = (bar.get_width() for bar in ax.patches)
    right = ax.get_xlim()[1]
    assert ours == 1.25 > right / 3 and ours < slow < right
    assert [text.get_text() for text in ax.texts] == ["1.25", "1.50", "1.40", "18.96 →"]
    assert all(text.get_window_extent().x1 < ax.bbox.x1 for text in ax.texts)
    assert "→" in ax.get_xlabel() and ax.xaxis.label.get_window_extent().x1 < figure.bbox.x1
    even = figures(row("full loss", "a"), row("full loss", "b", ratio_to_products=2.0))["full loss"].axes[0]
    assert [bar.get_width() for bar in even.patches] == [1.25, 2.0] and "→" not in even.get_xlabel()


def test_a_legend_covers_no_point_and_a_title_keeps_off_the_edge(figures):
    rows = [row("masked batches", name, live=live) for name in ("srft_kernels", "eager") for live in (0.1, 0.5, 1.0)]
    for figure in figures(*rows, row("full loss", "srft_kernels")).values():
        ax = figure.axes[0]
        assert figure.bbox.y1 - ax.title.get_window_extent().y1 > 0.09 * figure.dpi  # inches
        assert ax.get_legend() is None or not ax.get_legend().get_window_extent().overlaps(ax.bbox)


def test_memory_is_in_plain_numbers(figures):
    peaks = {128: 25e6, 256: 120e6, 512: 600e6, 1024: 2.1e9}
    rows = [row("peak memory", "a", tokens=n, peak_bytes=peak, case=f"peak memory: {n}") for n, peak in peaks.items()]
    ax = figures(*rows)["peak memory"].axes[0]
    low, high = ax.get_ylim()
    shown = [text.get_text() for text, at in zip(ax.get_yticklabels(), ax.get_yticks()) if low <= at <= high]
    assert shown == ["50", "100", "200", "500", "1,000", "2,000"] and not ax.get_yticklabels(minor=True)


def test_without_a_gpu_it_says_so(page):
    text = page(MACHINE | {"kind": "cpu", "driver": "none", "device": "a CPU"}, row("scoring", "srft_kernels"))
    assert "## GPU\n\nNot measured: full loss; scoring" in text and "driver" not in text.partition("## a CPU")[2]
    assert "| SRFT in one pass, 8192×4096×151936: share of the products | ≥ 0.92 | – | not measured |" in text
    assert text.count("### Targets") == 1


def test_the_same_results_make_the_same_files(page, tmp_path):
    def files() -> dict[str, bytes]:
        page(MACHINE, row("full loss", "srft_kernels"))
        return {path.name: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}

    assert files() == files()


def test_no_results_at_all(tmp_path):
    (tmp_path / "results").mkdir()
    report.main((), tmp_path / "results", tmp_path / "docs")
    assert "Not measured" in (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")


def test_what_a_run_that_ended_early_left(page):
    failed = untimed("verl", "failed", "RuntimeError: a | b\n  and more") | {"case": "full loss: a case"}
    skipped = untimed("all providers", "skipped", "no time left") | {"case": "scoring: never begun"}
    text = page(MACHINE, partial=True, seconds=252.4, left_out={"QuACK": "hung"}, untimed=[failed, skipped])
    assert "**Partial**" in text and "4 min 12 s" in text and "- QuACK: hung" in text
    assert "| verl | FAILED | | | | | | | RuntimeError: a / b and more |" in text
    assert "- scoring: never begun (no time left)" in text
    assert "Partial" not in page(MACHINE, row("full loss", "srft_kernels"))


def test_a_number_that_is_not_there_is_a_dash(page):
    strange = row("full loss", "a", ratio_to_products=float("inf"), tflops=None, peak_bytes=float("nan"))
    text = page(MACHINE, strange, row("peak memory", "a", peak_bytes=None))
    assert "| a | 48.4 ms | – | – | – | 3e-03 |" in text
    assert "inf" not in text.lower().replace("information", "") and "NaN" not in text


def test_two_passes_have_both_floors_and_hot_times_stand_beside(page):
    text = page(MACHINE, row("two pass", "a", products=4, hot_seconds=0.03, hot_products_seconds=0.02))
    assert "| 1.25 |" in text and "1.67 × the 3 products of who keeps the logits; hot L2: 30.00 ms, 1.50 ×" in text


def test_a_step_has_what_only_a_step_has(page):
    text = page(MACHINE, row("training step", "a", tokens_per_second=12345.6, seconds_rollout=1.5))
    assert "| tokens/s | sampling |" in text and "| 12,346 | 1.5 s |" in text


def test_what_was_not_checked_is_said(page):
    text = page(MACHINE, row("1 M tokens", "a", unchecked="the loss and dW are not checked"))
    assert "(the loss and dW are not checked)" in text


def test_files_of_elsewhere_are_read_too(page, tmp_path):
    other = tmp_path / "latest.json"
    machine = MACHINE | {"device": "another device"}
    other.write_text(json.dumps({"machine_info": machine, "benchmarks": [row("scoring", "elsewhere")]}))
    text = page(MACHINE, row("full loss", "srft_kernels"), files=(other,))
    assert "## another device" in text and "| elsewhere | 48.4 ms |" in text and "## NVIDIA H200" in text
    twice = tmp_path / "cuda.json"
    twice.write_text(other.read_text())
    with pytest.raises(SystemExit, match="one name"):
        page(MACHINE, files=(twice,))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine_info": {}, "benchmarks": [{}]}', "\0", None])
def test_a_file_that_is_no_run_is_refused_in_a_line(tmp_path, capsys, text):
    path = tmp_path / "nope.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as refused:
        report.main([path], tmp_path / "results", tmp_path / "docs")
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and not (tmp_path / "docs").exists()
    assert str(path) in line and ("No such file" if text is None else "no JSON of a run") in line and "make gpu" in line
