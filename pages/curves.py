"""Draws curves as SVG by matplotlib, in colors that the page decides.

matplotlib knows fixed colors alone. It is given stand-ins, which become CSS variables in the SVG,
so that a chart follows the page from light to dark.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pages.run_files import Series

WIDTH, HEIGHT = 420, 236  # of a chart, in units of its viewBox: CSS pixels on a phone
MARGINS = (52, 10, 12, 38)  # left, right, top, bottom
MOST_POINTS = 600  # of a line; more are averaged
MOST_MARKED = 60  # points of a line that get a dot each
MOST_ROWS = 24  # of a chart's table
NUM_COLORS = 8
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (7, 2, 2, 2))
_COLOR, _INK, _GRID = "#a0a1{:02x}", "#a0a200", "#a0a201"  # stand-ins
_rcparams: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart. ``raw`` are the points that it was smoothed from, drawn faintly."""

    label: str
    points: Series
    color: int = 0  # of NUM_COLORS
    dash: int = 0  # of DASHES: so that lines differ without colors too
    is_marked: bool = False  # each of its points is a measurement, and gets a dot
    raw: Series | None = None

    @property
    def dash_array(self) -> str:
        """For the key beside the chart."""
        return " ".join(f"{length:g}" for length in DASHES[self.dash % len(DASHES)])


@dataclass(frozen=True)
class Table:
    """The numbers of a chart in words, for those who cannot see it or want to read them."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: SVG, what it shows, its key and its numbers."""

    title: str
    description: str
    svg: str
    lines: list[Line]
    table: Table
    notes: list[str] = field(default_factory=list)


def smoothed(series: Series) -> tuple[Series, float]:
    """An exponential average of the finite values, over a 15th of them; and over how many steps
    that is. As for Adam's moments the start is not drawn towards zero."""
    finite = _averaged(series.finite)
    if len(finite) < 3:
        return finite, 0.0
    span = max(3.0, len(finite) / 15)
    decay = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, np.empty(len(finite))
    for index, value in enumerate(finite.values.tolist()):
        total, weight = decay * total + value, decay * weight + 1
        result[index] = total / weight
    steps_each = (finite.steps[-1] - finite.steps[0]) / (len(finite) - 1)
    return Series(finite.steps, result), span * steps_each


def _averaged(series: Series) -> Series:
    """At most ``MOST_POINTS``: averages over equal numbers of values."""
    if len(series) <= MOST_POINTS:
        return series
    edges = _edges(len(series))
    sizes = np.diff(np.append(edges, len(series)))
    steps = np.add.reduceat(series.steps, edges) / sizes
    return Series(steps, np.add.reduceat(series.values, edges) / sizes)


def _edges(num: int) -> NDArray[np.intp]:
    return np.linspace(0, num, MOST_POINTS, endpoint=False).astype(np.intp)


def draw_chart(
    title: str, description: str, lines: Sequence[Line], skipped: Sequence[int] = ()
) -> Chart | None:
    """A chart of the lines that have points; None where none has. ``skipped`` are steps to mark."""
    shown = [line for line in lines if len(line.points.finite)]
    if not shown:
        return None
    low, high = _range(shown)
    is_log = low > 0 and high / low > 100
    notes = [*_outside(shown, low, high)] + (["The axis is logarithmic."] if is_log else [])
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's would change the page
        matplotlib.rcParams.update({**_rcparams, "svg.hashsalt": title})
        svg = _draw(shown, (low, high), is_log, skipped)
    return Chart(title, description, _for_page(svg, title), shown, tabulate(shown), notes)


def _range(lines: Iterable[Line]) -> tuple[float, float]:
    """From the least to the largest of all lines and of their raw points; where a few of these lie
    far off, of the others."""
    values = [line.points.finite.values for line in lines]
    for raw in (line.raw.finite.values for line in lines if line.raw is not None):
        if len(raw):
            all_of_them, most = np.percentile(raw, [0, 100]), np.percentile(raw, [0.5, 99.5])
            values.append(all_of_them if np.ptp(all_of_them) <= 2 * np.ptp(most) else most)
    joined = np.concatenate(values)
    return float(joined.min()), float(joined.max())


def _outside(lines: Iterable[Line], low: float, high: float) -> Iterable[str]:
    raw = [line.raw.finite.values for line in lines if line.raw is not None]
    num = sum(int(((values < low) | (values > high)).sum()) for values in raw)
    if num:
        yield f"{num:,} of the single steps lie outside of the chart."


def _draw(
    lines: Sequence[Line], limits: tuple[float, float], is_log: bool, skipped: Sequence[int]
) -> str:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    FigureCanvasSVG(figure)
    left, right, top, bottom = MARGINS
    size = (WIDTH - left - right) / WIDTH, (HEIGHT - top - bottom) / HEIGHT
    axes = figure.add_axes((left / WIDTH, bottom / HEIGHT, *size))
    axes.grid(axis="y", alpha=0.6, linewidth=0.7)
    axes.set_axisbelow(True)
    for line in lines:
        if line.raw is not None:
            _draw_raw(axes, line)
    for line in lines:
        points = _averaged(line.points.finite)
        is_marked = (line.is_marked and len(points) <= MOST_MARKED) or len(points) == 1
        (artist,) = axes.plot(
            points.steps,
            points.values,
            color=_COLOR.format(line.color % NUM_COLORS),
            linewidth=1.8,
            marker="o" if is_marked else None,
            markersize=4.5,
        )
        if dashes := DASHES[line.dash % len(DASHES)]:
            artist.set_dashes(dashes)
    if is_log:
        axes.set_yscale("log")
    low, high = limits
    if not is_log:
        margin = 0.05 * (high - low) or 0.2 * abs(high) or 1.0
        from_zero = 0 <= low < 0.3 * high or 0 <= low == high
        low, high = (0.0 if from_zero else low - margin), high + margin
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_ylim(low, high)
    else:
        axes.set_ylim(low / 1.3, high * 1.3)
    if len(skipped):
        axes.plot(
            [*skipped][:2000],
            [0.02] * len(skipped[:2000]),
            "|",
            transform=axes.get_xaxis_transform(),
            color=_INK,
            markersize=7,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()


def _draw_raw(axes: Any, line: Line) -> None:
    """Each point; of very many the band that they lie in."""
    assert line.raw is not None
    raw, color = line.raw.finite, _COLOR.format(line.color % NUM_COLORS)
    if len(raw) <= MOST_POINTS:
        axes.plot(raw.steps, raw.values, color=color, alpha=0.3, linewidth=0.9)
        return
    edges = _edges(len(raw))
    least = np.minimum.reduceat(raw.values, edges)
    most = np.maximum.reduceat(raw.values, edges)
    axes.fill_between(raw.steps[edges], least, most, color=color, alpha=0.25, linewidth=0)


def _for_page(svg: str, title: str) -> str:
    """matplotlib's SVG as a part of an HTML page: with the page's colors, with no address in it,
    and with ids that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<svg [^>]*>", _svg_tag, svg, count=1)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    kept = {name for pair in used for name in pair if name}
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in kept else "", svg)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"#a0a1([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", svg)
    return svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)").strip()


def _svg_tag(_: re.Match[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true" focusable="false">'


def tabulate(lines: Sequence[Line]) -> Table:
    """Rows at the measured steps if a line has some, else at steps of the first; each value is the
    newest that the line has there."""
    anchor = next((line for line in lines if line.is_marked), lines[0]).points.finite.steps
    if len(anchor) > MOST_ROWS:
        anchor = anchor[np.linspace(0, len(anchor) - 1, MOST_ROWS).round().astype(np.intp)]
    rows = []
    for step in anchor.tolist():
        row = [f"{step:,.0f}"]
        for line in lines:
            points = line.points.finite
            index = int(np.searchsorted(points.steps, step, side="right")) - 1
            row.append(short(points.values[index], 4) if index >= 0 else "")
        rows.append(row)
    return Table(["step", *(line.label for line in lines)], rows)


def short(value: float, digits: int = 3) -> str:
    """``0.0788``, ``12.5``, ``1.5k``, ``2.1M``: for axes and tables."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:.{digits}g}{name}"
    return f"{value:.{digits}g}"
