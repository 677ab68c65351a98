"""Pages of HTML that are whole in themselves: templates, numbers for people, and curves.

Curves are SVG drawn by matplotlib, written into the page; nothing is fetched when it is opened.
"""

import importlib.util
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from srft.errors import missing
from srft.intervals import shown, shown_signed

COLORS = ["#4c78d8", "#e07b39", "#3a9d6e", "#b565c9", "#c9a227", "#d1495b", "#2aa1b3", "#8a7f72"]  # on light and dark
DASHES = ["-", (0, (4, 2)), (0, (1, 1.5))]  # where there are more lines than colours
LEGEND = 3  # columns of it
INK = "#010203"  # stands for the page's text colour until the SVG is written


def render(template: str, **values: Any) -> str:
    """A page from one of the templates in this directory."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("srft", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "interval": shown, "signed": shown_signed}
    return environment.get_template(template).render(**values)


def require_packages(page: str) -> None:
    """Raise UserError, with what to install, if a package that the page needs is not there."""
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise missing(package, page)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share for people; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def svg(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    unit: str,
    changes: Sequence[float] = (),
    over: str = "",
    whole: bool = True,
) -> str:
    """One small figure as an <svg> element whose text takes the colour and the font of the page.

    lines: an empty one keeps its colour, and is not there.   unit: of the y axis.   changes: where upright lines are.
    over: what the x axis is.   whole: it counts something.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # hashsalt: ids of clip paths are hashes, and must differ between the figures of one page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        rows = math.ceil(len(lines) / LEGEND) - 1
        figure = Figure(figsize=(4.2, 2.3 + 0.16 * rows + 0.12 * bool(over)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        styles = itertools.cycle([(color, dash) for dash in DASHES for color in COLORS])
        for (color, dash), (name, points) in zip(styles, lines.items()):
            if not points:
                continue
            x, y = zip(*points)
            marker, size = "o" if len(x) < 40 else "", 5 if len(x) == 1 else 2.6
            label = f"{' ' * name.startswith('_')}{name}".replace("$", "\\$")  # to matplotlib these mean something
            axes.plot(x, y, color=color, linestyle=dash, linewidth=1.6, marker=marker, markersize=size, label=label)
        for x in changes:
            axes.axvline(x, color=INK, alpha=0.45, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(INK)
            axes.spines[side].set_alpha(0.35)
        axes.tick_params(colors=INK, length=0)
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.ticklabel_format(useOffset=False)
        axes.set_ylabel(unit, color=INK)
        axes.set_xlabel(over, color=INK)
        if len(lines) > 1:
            columns = min(LEGEND, len(lines))
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", drawing)
    # ids of the <g> elements are the same in every figure, and nothing refers to them
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', 'role="img"', drawing, count=1
    )
