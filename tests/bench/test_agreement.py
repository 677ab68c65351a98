"""Two runs held against each other, row by row."""

import json

import pytest

from bench import agreement


def run(kind: str, **ratios) -> dict:
    """A row of each name: its ratio, or (ratio, noisy); None: without a ratio."""
    rows = []
    for name, ratio in ratios.items():
        ratio, noisy = ratio if isinstance(ratio, tuple) else (ratio, False)
        rows.append({"extra_info": {"case": name, "provider": "eager", "ratio_to_products": ratio, "noisy": noisy}})
    return {"machine_info": {"kind": kind}, "benchmarks": rows}


@pytest.mark.parametrize("kind, within, beyond", [("cuda", 0.04, 0.06), ("cpu", 0.14, 0.16)])
def test_rows_that_differ_by_more_than_their_device_may(kind, within, beyond):
    before = run(kind, a=1.0, b=1.0, c=1.0, d=1.0, alone=1.0)
    after = run(kind, a=1 + within, b=1 - within, c=1 + beyond, d=1 - beyond, new=9.0)
    lines, compared = agreement.disagreements(before, after)
    assert compared == 4 and [line.split()[-2] for line in lines] == ["c,", "d,"]


def test_a_noisy_row_has_promised_nothing():
    for before, after in (((1.0, True), 2.0), (1.0, (2.0, True)), (None, 1.0)):
        assert agreement.disagreements(run("cpu", a=before), run("cpu", a=after)) == ([], 0)


@pytest.mark.parametrize(
    "before, after, status", [({"a": 1.0}, {"a": 1.1}, 0), ({"a": 1.0}, {"a": 1.2}, 1), ({"a": 1.0}, {"b": 1.0}, 1)]
)
def test_the_command(tmp_path, capsys, before, after, status):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ratios in zip(paths, (before, after)):
        path.write_text(json.dumps(run("cpu", **ratios)), encoding="utf-8")
    assert agreement.main(list(map(str, paths))) == status
    text = capsys.readouterr().out
    assert ("+20%  1.00 → 1.20 × products  a, eager" in text) == (after == {"a": 1.2})
    assert text.endswith(f"{int('a' in after)} rows compared, {int(after == {'a': 1.2})} disagree\n")


def test_what_cannot_be_compared_is_said(capsys):
    with pytest.raises(ValueError, match=r"two runs on the same machine"):
        agreement.disagreements(run("cpu", a=1.0), run("cuda", a=1.0))
    assert agreement.main(["one.json"]) == 2 and "expected two files" in capsys.readouterr().err
