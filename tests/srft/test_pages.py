"""Curves as they are written into pages."""

import re

from srft.pages import COLORS, svg


def ticks(drawing: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing)


def test_axes_count_whole_steps_and_hide_no_offset():
    assert ticks(svg("one step", {"loss": [(1, 0.5)]}, ""))[0] == "1"
    assert [text for text in ticks(svg("one step", {"loss": [(1, 0.5)]}, "")) if text.startswith(("0.9", "1."))] == []
    flat = ticks(svg("flat", {"entropy": [(1, 10.78981), (2, 10.789815), (3, 10.78982)]}, "nats"))
    assert not [text for text in flat if "e" in text or "+" in text] and [text for text in flat if "10.7898" in text]


def test_a_line_that_is_not_there_keeps_its_colour():
    lines = {"a": [(1, 1.0), (2, 2.0)], "b": [], "c": [(1, 2.0), (2, 1.0)]}
    drawing = svg("three", lines, "", over="seconds")
    assert {"a", "c", "seconds"} <= {*ticks(drawing)} and "b" not in ticks(drawing)
    assert COLORS[0] in drawing and COLORS[2] in drawing and COLORS[1] not in drawing


def test_more_lines_than_colours_are_told_apart():
    many = {f"m{n}": [(1, float(n)), (2, float(n))] for n in range(11)}
    drawing = svg("many", many, "")
    assert all(name in ticks(drawing) for name in many) and "stroke-dasharray" in drawing
