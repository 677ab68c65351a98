"""The rows of one step's sequences packed and padded, on a model that is smaller still."""

import pytest

from bench import packing, report
from bench.providers import OURS, PADDED, UNSHARED
from bench.record import timed
from srft.model import Rows


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 258}
    monkeypatch.setitem(packing.LLAMAS, "cpu", sizes)
    monkeypatch.setitem(packing.BUDGETS, "cpu", 1024)


def test_each_way_is_measured():
    began = []
    rows = packing.measure_packing("cpu", 2, begin=began.append)
    assert [(row.provider, row.status, len(row.seconds)) for row in rows] == [
        (name, "ok", 2) for name in (OURS.name, UNSHARED, PADDED)
    ], rows
    assert began == ["all providers", OURS.name, UNSHARED, PADDED, "all providers"]
    needed = {"peak_bytes", "ratio_to_products", "tflops", "tokens_per_second", "error"}
    assert all(needed <= set(row.extra) and row.extra["error"] < 1e-3 for row in rows)
    tokens = sum(len(each.completion) for each in packing.sequences("cpu"))
    for row in rows:
        middle = sum(row.seconds) / 2
        assert row.extra["tflops"] == pytest.approx(6 * tokens * 32 * 258 / middle / 1e12)
        assert row.extra["tokens_per_second"] == pytest.approx(tokens / middle)
    extra = [timed(row)["extra_info"] | {"median": 1.0, "status": "ok"} for row in rows]
    assert {row["case"] for row in extra} == {str(packing.packing_case("cpu"))}
    assert "| prompts of their own | 1,000.0 ms |" in "\n".join(report.table(str(rows[0].case), extra))


def test_a_way_that_is_wrong_has_no_time(monkeypatch):
    update = packing.update

    def wrong(model, of_step, rows, budget):
        loss, norm = update(model, of_step, rows, budget)
        return loss, norm * (1.01 if rows == Rows(packed=True) else 1)

    monkeypatch.setattr(packing, "update", wrong)
    ours, unshared, padded = packing.measure_packing("cpu", 1)
    assert (unshared.status, unshared.seconds) == ("wrong", []) and "error 0.01" in unshared.reason
    assert ours.status == padded.status == "ok"


def test_its_sequences_are_those_of_a_step():
    found = packing.sequences("cpu")
    assert [each.is_demo for each in found] == [False, False, False, False, True] * 4
    assert len({tuple(each.prompt) for each in found}) == 4
    assert all(16 <= len(each.completion) <= 512 for each in found)
