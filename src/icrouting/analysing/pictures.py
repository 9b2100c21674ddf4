"""Pictures: inline SVG in the page's own colours, light or dark as the reader's screen is."""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icrouting.report.figures import COLOURS, SHAPES, WIDTH, in_our_style
from icrouting.runtime.pages import MINUS

# What the page gives its own colours. Okabe and Ito's are told apart with every common colour
# blindness, and shapes repeat the distinction.
INK = "#1c1c1d"
FAINT = "#d5d5d6"
SERIES = (COLOURS[2], COLOURS[4], COLOURS[3], COLOURS[1], COLOURS[5], COLOURS[6], INK)
_VARIABLES = {INK: "ink", FAINT: "faint", COLOURS[2]: "blue", COLOURS[3]: "green"}
_VARIABLES |= {COLOURS[4]: "red"}
_THEME: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
NONE = "\N{EN DASH}"
P = ParamSpec("P")


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        title: what is shown.
        svg: the picture, to stand inside the page.
        says: what it shows here, in a sentence of figures.
        reading: how it is read.
        table: the name of the table whose numbers it shows.
    """

    title: str
    svg: str
    says: str
    reading: str
    table: str


@dataclass(frozen=True)
class Marks:
    """Estimates with intervals, one for each row of a picture; NaN draws nothing."""

    values: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def _themed(draw: Callable[P, str]) -> Callable[P, str]:
    """Has a function draw in our style and the page's colours."""

    @in_our_style
    @wraps(draw)
    def drawn(*args: P.args, **settings: P.kwargs) -> str:
        with matplotlib.rc_context(_THEME):
            return draw(*args, **settings)

    return drawn


def inline(figure: Figure) -> str:
    """Returns a figure as SVG that can stand in a page beside others, and takes its colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Its size is that of the place it stands in.
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    # A digest of what is drawn names its parts, so that no two pictures share a name by chance.
    mark = f"{hash_of(svg)}-"
    svg = svg.replace('id="', f'id="{mark}').replace('href="#', f'href="#{mark}')
    svg = svg.replace("url(#", f"url(#{mark}")
    for colour, name in _VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var(--{name})", svg, flags=re.IGNORECASE)
    return svg


def hash_of(text: str) -> str:
    """Returns eight letters and digits, the first a letter, that stand for a text."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:7]


@_themed
def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    x_log: bool = False,
    y_log: bool = False,
    y_from: float | None = None,
    y_to: float | None = None,
    marked_from: float | None = None,
) -> str:
    """Returns lines with marks, x and y by name.

    Args:
        series: the lines.
        x_label: names the axis across, with its unit.
        y_label: names the axis up, with its unit.
        bands: low and high ends around some of the lines.
        x_log: whether the axis across is logarithmic.
        y_log: whether the axis up is; a 0 is not drawn there.
        y_from: where the axis up begins; None where its values do.
        y_to: where it ends.
        marked_from: a place on the axis across from which on it is shaded.
    """
    figure = Figure(figsize=(WIDTH, 3.1 + 0.16 * ((len(series) + 1) // 2)))
    axes = figure.subplots()
    for place, (name, (x, y)) in enumerate(series.items()):
        colour, shape = _look(place)
        axes.plot(x, y, color=colour, marker=shape, markersize=4, linewidth=1.3, label=_plain(name))
        if bands and name in bands:
            low, high = bands[name]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if x_log:
        axes.set_xscale("log", base=2)
        x_values = next(iter(series.values()))[0]
        axes.set_xticks(x_values, [f"{x:g}" for x in x_values], minor=False)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if y_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if marked_from is not None:
        right = axes.get_xlim()[1]
        axes.axvspan(marked_from, right, color=FAINT, alpha=0.35, linewidth=0, zorder=0)
        axes.set_xlim(right=right)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=y_from, top=y_to)
    axes.grid(True)
    _legend(figure, axes, len(series))
    return inline(figure)


@_themed
def dots(
    rows: Sequence[str],
    series: Mapping[str, Marks],
    x_label: str,
    *,
    zero: bool = True,
    log: bool = False,
) -> str:
    """Returns estimates with intervals, a row for each name, the first on top.

    Args:
        rows: names the rows.
        series: the estimates, by name.
        x_label: names the axis, with its unit.
        zero: whether a line marks 0.
        log: whether the axis is logarithmic above its smallest value.
    """
    height = max(0.24, 0.13 * len(series) + 0.06)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.18 * ((len(series) + 1) // 2) + len(rows) * height))
    axes = figure.subplots()
    step = 0.8 / max(1, len(series))
    for place, (name, marks) in enumerate(series.items()):
        colour, shape = _look(place)
        heights = np.arange(len(rows)) + step * (place + 0.5) - 0.4
        axes.hlines(heights, marks.lows, marks.highs, color=colour, linewidth=1.2)
        axes.plot(marks.values, heights, shape, color=colour, markersize=4.5, label=_plain(name))
    if zero and not log:
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
    if log:
        _log_axis(axes, [value for marks in series.values() for value in marks.values])
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color=FAINT, linewidth=0.6)
    axes.set_yticks(range(len(rows)), [_plain(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    axes.grid(True, axis="x")
    _legend(figure, axes, len(series))
    return inline(figure)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive:
        # Linear below, so that a 0 has a place.
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_xlim(left=0)


@_themed
def matrix(
    values: Float[np.ndarray, "n_rows n_columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    colour_label: str,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    x_label: str = "",
    y_label: str = "",
    low: float | None = None,
    high: float | None = None,
    signed: bool = False,
) -> str:
    """Returns a heat map with its scale, the first row on top.

    Args:
        values: what is coloured; NaN is left out.
        rows: names the rows.
        columns: names the columns.
        colour_label: names what the colours stand for, with its unit.
        texts: what is written into the squares; None writes nothing.
        x_label: names the columns together.
        y_label: names the rows together.
        low: where the scale begins; None where the values do.
        high: where it ends.
        signed: whether the middle of the scale is its zero.
    """
    n_rows, n_columns = values.shape
    row_height = 0.28 if n_columns > 6 else 0.36
    figure = Figure(figsize=(WIDTH, 1.5 + n_rows * row_height))
    axes = figure.subplots()
    image = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap="PuOr_r" if signed else "cividis",
        vmin=low,
        vmax=high,
        edgecolors="none",
    )
    if texts is not None:
        _write(axes, values, texts, image)
    every = max(1, -(-n_columns // 16))
    places = np.arange(0, n_columns, every)
    is_long = max(map(len, columns), default=0) > 4
    axes.set_xticks(places + 0.5, [_plain(columns[int(place)]) for place in places], fontsize=8)
    if is_long and n_columns > 3:
        axes.tick_params(axis="x", rotation=40)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(n_rows) + 0.5, [_plain(row) for row in rows], fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.invert_yaxis()
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    scale = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.03)
    scale.set_label(colour_label, fontsize=8)
    scale.ax.tick_params(labelsize=8)
    scale.locator = MaxNLocator(nbins=5)
    scale.update_ticks()
    scale.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return inline(figure)


def _write(axes: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], image: Any) -> None:
    for row, column in np.ndindex(values.shape):
        if np.isnan(values[row, column]):
            continue
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "#ffffff" if is_dark else "#000000"
        axes.text(
            column + 0.5,
            row + 0.5,
            texts[int(row)][int(column)],
            color=colour,
            ha="center",
            va="center",
            fontsize=7,
        )


@_themed
def scatter(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    hollow: Sequence[str],
    x_label: str,
    y_label: str,
) -> str:
    """Returns points by group, those of some groups hollow."""
    figure = Figure(figsize=(WIDTH, 3.9 + 0.16 * ((len(groups) + 1) // 2)))
    axes = figure.subplots()
    for place, (name, (x, y)) in enumerate(groups.items()):
        colour, shape = _look(place)
        face = "none" if name in hollow else colour
        axes.plot(
            x,
            y,
            shape,
            markeredgecolor=colour,
            markerfacecolor=face,
            markersize=5,
            label=_plain(name),
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(True)
    _legend(figure, axes, len(groups))
    return inline(figure)


def _look(place: int) -> tuple[str, str]:
    n_rounds, colour = divmod(place, len(SERIES))
    return SERIES[colour], SHAPES[(place + n_rounds) % len(SHAPES)]


def _legend(figure: Figure, axes: Axes, n: int) -> None:
    if n > 1:
        # Long names would not fit side by side on a phone's width.
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        n_columns = 3 if longest <= 16 else 2 if longest <= 30 else 1
        figure.legend(loc="outside upper left", ncols=n_columns, fontsize=8)


def or_dash(value: float, form: str = ".2f") -> str:
    """Returns a number as text, a dash where there is none."""
    return NONE if np.isnan(value) else format(value, form).replace("-", MINUS)


def _plain(text: str) -> str:
    """A text that is drawn as it is, where a pair of dollars would be read as mathematics."""
    return text.replace("$", r"\$")
