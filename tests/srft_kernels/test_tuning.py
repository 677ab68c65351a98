"""Launch settings: the table, what they may change in results, and their measurement rehearsed on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

import srft_kernels as sk
from srft_kernels.head import Head, aligned_size
from srft_kernels.rows import tuning

from .cases import in_one_pass, in_second_pass

ROWS = pytest.importorskip("srft_kernels.rows.triton_rows").TritonRows()
tune = pytest.importorskip("bench.tune")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


def results(launch: tuning.Launch, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Everything that the three kernels make of the same seven rows, one of them dead."""
    n, vocab = 7, 131
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, vocab, generator=generator) * 3
    tokens = sk.Tokens(torch.arange(n) * 18, advantages=torch.tensor([0.0, 1, -1, 2, 0.5, -0.1, 3]))
    weight = torch.tensor([1, 0.5, 0, 2, 1, 1, 1])

    def logits() -> torch.Tensor:
        return torch.empty(n, aligned_size(vocab))[:, :vocab].copy_(values)

    with tuning.forced(launch):
        stats, normalizer = ROWS.statistics(logits(), tokens.target, Head())
        fused = in_one_pass(ROWS, logits(), tokens, weight, sk.grpo(entropy_coef=0.1), Head(), dtype=dtype)
        coefs = tuple(torch.randn(3, n, generator=generator))
        second = in_second_pass(ROWS, logits(), tokens.target, normalizer, coefs, Head(), dtype=dtype)
    return [*stats.fields(), *normalizer, *fused[0].fields(), *fused[1:], second]


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_programs_that_walk_over_rows_give_bitwise_what_a_program_per_row_gives(programs):
    one_each = results(tuning.Launch(32, 1))
    for walking, own in zip(results(tuning.Launch(32, 1, programs)), one_each):
        assert torch.equal(walking, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_either_order_of_the_second_read_gives_the_same_bits(block, dtype):
    """131 numbers: more than three blocks, in two of three parts of which L2 is told to keep nothing, or none whole."""
    forward = results(tuning.Launch(block, 1), dtype)
    for backward, own in zip(results(tuning.Launch(block, 1, backward=True), dtype), forward):
        assert torch.equal(backward, own)


def test_grid(monkeypatch):
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    grid = lambda programs, rows: tuning.Launch(8192, 16, programs).grid(rows, torch.device("cpu"))  # noqa: E731
    assert [grid(None, 500), grid(2, 500), grid(2, 100), grid(0.5, 500), grid(0.001, 5)] == [
        (500,), (264,), (100,), (66,), (1,)]  # fmt: skip


def test_multiprocessors(monkeypatch):
    """What a device calls them: of an Intel GPU they are subslices."""
    seen = lambda **properties: lambda device: SimpleNamespace(**properties)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", seen(multi_processor_count=132))
    monkeypatch.setattr(torch.xpu, "get_device_properties", seen(gpu_subslice_count=64))
    count = tuning.multiprocessors.__wrapped__
    assert [count(torch.device(name)) for name in ("cuda:7", "xpu:7", "cpu")] == [132, 64, 1]
    assert tuning.target.__wrapped__(torch.device("xpu:7")) == "xpu"


def test_small_rows_keep_the_numbers_per_thread():
    wide = tuning.Launch(8192, 16, 2)
    assert wide.fitted(151_936) == wide
    assert wide.fitted(2048) == tuning.Launch(2048, 4, 2)
    assert wide.fitted(2049) == tuning.Launch(4096, 8, 2)
    assert [wide.fitted(vocab).block for vocab in (1, 2, 3, 100)] == [4, 4, 4, 128]
    assert wide.fitted(100).warps == 1


def test_the_table_in_the_package_has_a_row_for_anything():
    for row in tuning.table():
        assert set(row) - {"why"} == {"kernel", "target", "vocab", "block", "warps", "programs", "backward", "measured"}
        assert row["measured"] or row["why"], "a row that nobody measured gives its reason"
    assert [tuning.table()[-1][name] for name in ("kernel", "target", "vocab")] == ["*", "*", None]
    for kernel in tuning.KERNELS:
        assert tuning.launch(kernel, 10**6, "a target of tomorrow").block > 0


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of the test's own: yields a function that writes it."""
    path = tmp_path / "tuning.json"
    monkeypatch.setattr(tuning, "TABLE", path)

    def write(rows):
        path.write_text(json.dumps(rows), encoding="utf-8")
        tuning.reload()

    yield write
    monkeypatch.undo()
    tuning.reload()


def row(block, kernel="*", target="*", vocab=None, **more):
    return {"kernel": kernel, "target": target, "vocab": vocab, "block": block, "warps": 1, "programs": None,
            "backward": False, "measured": None, **more}  # fmt: skip


def test_the_first_row_that_fits_is_used(table):
    table([row(512, "gradient", "sm_90", 1024), row(1024, "gradient", "sm_90"), row(2048, target="sm_90"), row(4096)])
    block = lambda *what: tuning.launch(*what).block  # noqa: E731
    assert block("gradient", 1024, "sm_90") == 512
    assert block("gradient", 9999, "sm_90") == 1024
    assert block("statistics", 9999, "sm_90") == 2048
    assert block("gradient", 9999, "sm_80") == 4096
    table([row(512, target="sm_90")])
    with pytest.raises(LookupError, match=r"no row for the gradient kernel on sm_80: its last row should be for any"):
        tuning.launch("gradient", 100, "sm_80")


def test_a_row_holds_from_half_its_vocabulary_to_it(table):
    """What was measured on 152,000 entries says nothing of 4,096, nor of what is larger."""
    table([row(512, target="sm_90", vocab=32_768), row(1024, target="sm_90", vocab=262_144), row(2048)])
    blocks = {vocab: tuning.launch("gradient", vocab, "sm_90").block
              for vocab in (4096, 16_384, 16_385, 32_768, 32_769, 131_072, 131_073, 262_144, 262_145)}  # fmt: skip
    assert list(blocks.values()) == [2048, 2048, 512, 512, 2048, 2048, 1024, 1024, 2048]


def test_measured_rows_come_first_and_replace_their_own(table):
    table([row(1, "gradient", "sm_90", 1024), row(2, "gradient", "sm_80", 1024), row(3)])
    tune.write([row(4, "gradient", "sm_90", 2048), row(5, "gradient", "sm_90", 1024)], tuning.TABLE)
    tuning.reload()
    assert [(r["block"], r["vocab"]) for r in tuning.table()] == [(2, 1024), (5, 1024), (4, 2048), (3, None)]


def timing(block, seconds, status="ok"):
    return {"kernel": "gradient", "target": "sm_90", "vocab": 151_936, "rows": 8, "block": block, "warps": 4,
            "programs": None, "backward": False, "status": status, "seconds": seconds}  # fmt: skip


@pytest.mark.parametrize(
    "others, expected",
    [
        ([timing(2, 0.99)], 1),  # noise
        ([timing(2, 0.9), timing(3, 0.8)], 3),
        ([timing(2, 0.1, "wrong"), timing(3, 0.9)], 3),
    ],
)
def test_the_settings_before_stay_unless_another_is_clearly_faster(others, expected):
    made = {"device": "a GPU", "packages": {}, "commit": "0"}
    best = tune.best([timing(1, 1.0), *others], made)
    assert best["block"] == expected and best["vocab"] == 262_144
    assert best["measured"]["of_the_settings_before"] == 1e6


def test_the_settings_before_are_worth_their_better_time():
    made = {"device": "a GPU", "packages": {}, "commit": "0"}
    assert tune.best([timing(1, 1.0), timing(1, 0.9), timing(2, 0.89)], made)["block"] == 1


def test_rehearsal(table, tmp_path, capsys):
    """Every kernel with every candidate in the interpreter: the whole command, its table used afterwards."""
    table([row(64)])
    out = tmp_path / "new.json"
    assert tune.main(["--device", "cpu", "--seconds", "100", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(kernel in text for kernel in tuning.KERNELS) and "wrong" not in text and "failed" not in text
    new = json.loads(out.read_text(encoding="utf-8"))
    assert {(r["kernel"], r["vocab"]) for r in new[:-1]} == {(k, v) for k in tuning.KERNELS for v in (32, 128)}
    assert new[-1] == row(64) and all(r["target"] == "cpu" and r["measured"]["microseconds"] > 0 for r in new[:-1])


def test_without_time_everything_is_skipped():
    found = tune.tune("cpu", 0)
    assert found["rows"] == found["timings"] == [] and len(found["skipped"]) == 12


def test_what_is_cheap_to_know_comes_first_and_is_kept_at_once(monkeypatch):
    """Programs of every kernel before any block or warp, the most important vocabularies first; rows after each."""
    asked, rows = [], []

    def measured(kernel, vocab, device, dtype, deadline, before):
        asked.append((vocab, tune.candidates(tuning.Launch(64, 2), before, "cuda")))
        return [timing(64, 2.0), timing(64, 1.0) | {"programs": 0.5}], True

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setitem(tune.VOCABS, "cpu", tune.VOCABS["cuda"])
    tune.tune("cpu", 100, each=lambda found: rows.append(len(found["rows"])))
    assert [vocab for vocab, _ in asked[::3]] == [151_936, 32_000, 128_256, 65_536] * 2
    first, second = asked[0][1], asked[12][1]
    other = tuning.Launch(64, 2, backward=True)
    assert first == [other, *(tuning.Launch(64, 2, programs) for programs in tune.PROGRAMS)]
    assert len(second) > 4 and {launch.programs for launch in second} == {0.5}
    assert rows == [*range(1, 13), *[12] * 12]


def test_on_cuda_the_host_runs_ahead(monkeypatch):
    """Restored, started, called and ended as often as asked for; waited for once, at the end."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    times = tune.seconds_each(lambda: log.append("call"), lambda: log.append("copy"), "cuda", 3)
    assert log == ["copy", "event", "call", "event"] * 3 + ["wait"] and times == [2.0] * 3


def test_logits_are_restored_and_a_wrong_candidate_is_refused(monkeypatch):
    """Each call sees the logits afresh; settings under which a kernel gives other results are never chosen."""
    seen = []

    def caller(kernel, logits, dtype, generator):
        def run():
            seen.append(logits.clone())
            wrong = tuning.launch(kernel, logits.shape[1], "cpu").block == 32
            logits.zero_()
            return [torch.ones(2), torch.tensor([1.0, torch.nan if wrong else 1.0])]

        return run

    monkeypatch.setattr(tune, "caller", caller)
    timings, complete = tune.measure("statistics", 96, "cpu", torch.float32, float("inf"), [])
    assert complete and all(torch.equal(logits, seen[0]) for logits in seen) and seen[0].any()
    tiles, complete = tune.measure("statistics", 96, "cpu", torch.float32, float("inf"), timings)
    assert complete and {t["status"] for t in tiles if t["block"] == 32} == {"wrong"}
    assert {t["status"] for t in timings + tiles if t["block"] != 32} == {"ok"}
