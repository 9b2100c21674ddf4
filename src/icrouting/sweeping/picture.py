"""Picture: a sweep's accuracies and differences with their intervals, as SVG text."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icrouting.report.figures import COLOURS, GREY, PALE_GREY, in_our_style
from icrouting.report.metrics import Estimate
from icrouting.sweeping.table import SETTING, Line, Table

# In inches: what stays readable on a phone.
WIDTH = 5.6
# A colour and a shape by group; shapes repeat the distinction, for prints in grey.
LOOKS = {"source": (COLOURS[2], "o"), "unseen": (COLOURS[4], "s")}


@in_our_style
def picture(table: Table) -> str:
    """Returns accuracy and the difference to the reference, a row a setting or method."""
    names = list(table.names)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.36 * len(names)))
    accuracies, leads = figure.subplots(1, 2, sharey=True)
    groups = table.shown_groups
    for row, name in enumerate(names):
        for place, group in enumerate(groups):
            line = table.line(name, group)
            if line is not None:
                height = row + 0.22 * (place - (len(groups) - 1) / 2)
                _draw(accuracies, leads, line, height)
    _name_rows(accuracies, table)
    leads.axvline(0, color="black", linewidth=1, zorder=1)
    accuracies.set_xlabel("accuracy, %")
    leads.set_xlabel("points above the reference\n(filled: the interval is beside 0)")
    for axes in (accuracies, leads):
        axes.grid(True, axis="x")
    handles = []
    for group in groups:
        colour, shape = LOOKS[group]
        label = f"{group} tasks"
        handles += accuracies.plot(
            [], [], color=colour, marker=shape, linestyle="none", label=label
        )
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    buffer = io.StringIO()
    # Without the date: the same figures make the same picture.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw(accuracies: Axes, leads: Axes, line: Line, height: float) -> None:
    """Draws a line's two estimates; a lead that noise may be all of has an empty dot."""
    colour, shape = LOOKS[line.group]
    _dot(accuracies, line.accuracy, height, colour, shape, is_full=True)
    if line.lead.n:
        is_clear = line.lead.low > 0 or line.lead.high < 0
        _dot(leads, line.lead, height, colour, shape, is_full=is_clear)


def _dot(
    axes: Axes, estimate: Estimate, height: float, colour: str, shape: str, *, is_full: bool
) -> None:
    ends = [100 * estimate.low, 100 * estimate.high]
    axes.plot(ends, [height, height], color=colour, linewidth=1.2)
    axes.plot(
        100 * estimate.value,
        height,
        color=colour,
        marker=shape,
        mfc=colour if is_full else "white",
        ms=4.5,
    )


def _name_rows(axes: Axes, table: Table) -> None:
    """Names the rows, the first on top, with a line between settings and methods."""
    names = list(table.names.items())
    for place in range(1, len(names)):
        is_border = names[place][1] != names[place - 1][1]
        colour = GREY if is_border else PALE_GREY
        for panel in axes.figure.axes:
            panel.axhline(place - 0.5, color=colour, linewidth=0.8)
    titles = []
    for name, kind in names:
        title = name.replace(" ", "\n") if kind == SETTING else name
        titles.append(f"{title}\n(reference)" if name == table.reference else title)
    axes.set_yticks(range(len(titles)), titles, fontsize=8)
    axes.set_ylim(len(titles) - 0.5, -0.5)
