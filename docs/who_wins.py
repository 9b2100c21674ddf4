"""Draws who-wins.svg, the gains of every method from the reports under benchmarks/results.

python docs/who_wins.py
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icrouting.report.wording import label

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "who-wins.svg"
PANELS = {"source": "the five source tasks", "unseen": "the other seven tasks"}


@dataclass(frozen=True)
class Run:
    """A run that marks are drawn from.

    Attributes:
        ending: how its methods' names end.
        height: how far above a method's line its mark is drawn.
        panels: the panels that it is drawn in.
    """

    ending: str
    height: float
    panels: Collection[str]


@dataclass(frozen=True)
class Kind:
    """A kind of mark, and the runs by folder that it is drawn from."""

    colour: str
    shape: str
    runs: dict[str, Run]


NOT_FITTED_KIND = "no fit, or one router (few-shot: 3 draws)"
KINDS = {
    NOT_FITTED_KIND: Kind("#000000", "o", {"smollm2-135m": Run("", 0, PANELS)}),
    "fitted once on the source tasks (three seeds)": Kind(
        "#0072B2", "D", {"smollm2-135m-rivals-once": Run("-once", 0.22, PANELS)}
    ),
    # On the source tasks the run of three seeds stands for the two of one seed each.
    "fitted on each task (left: 3 seeds; right: 2)": Kind(
        "#D55E00",
        "s",
        {
            "smollm2-135m-rivals-in-domain-sources": Run("", -0.04, ["source"]),
            "smollm2-135m-rivals-in-domain": Run("", -0.04, ["unseen"]),
            "smollm2-135m-rivals-in-domain-seed-1": Run("", -0.3, ["unseen"]),
        },
    ),
}
NOT_FITTED = ("icr", "few-shot", "multi-task-few-shot", "calibration")


def report_of(run: str) -> Path:
    """Returns the file of a run's figures."""
    return ROOT / "benchmarks" / "results" / run / "report.csv"


def files() -> list[Path]:
    """Returns the reports that are drawn."""
    return [report_of(run) for kind in KINDS.values() for run in kind.runs]


def gains() -> pd.DataFrame:
    """Returns a line a mark: kind, run, height above its method's line, group, method and gain."""
    marks = []
    for name, kind in KINDS.items():
        for folder, run in kind.runs.items():
            lines = pd.read_csv(report_of(folder)).query("kind == 'mean'")
            is_in_panel = lines.name.isin(run.panels)
            is_of_kind = lines.method.str.endswith(run.ending)
            lines = lines[is_in_panel & lines.gain.notna() & is_of_kind]
            method = lines.method.str.removesuffix(run.ending)
            # Every run has methods without a fit beside the fitted ones: they are drawn once.
            is_drawn = method.isin(NOT_FITTED) == (name == NOT_FITTED_KIND)
            lines = lines.assign(method=method, mark=name, run=folder, height=run.height)
            marks.append(lines[is_drawn])
    return pd.concat(marks)


def digest() -> str:
    """Returns a digest of the figures and of how they are drawn, which the picture carries."""
    content = b"".join(file.read_bytes() for file in (Path(__file__), *files()))
    return hashlib.sha256(content).hexdigest()[:16]


def drawn() -> str:
    """Returns the digest of the figures that the picture as it lies there was made of."""
    return re.findall(r"figures ([0-9a-f]{16})", PICTURE.read_text())[0]


def draw() -> Figure:
    """Returns the picture: a panel a group, a line a method, the best on source tasks on top."""
    marks = gains()
    best_gains = marks[marks.name == "source"].groupby("method").gain.max()
    methods = best_gains.sort_values().index.tolist()
    figure = Figure(figsize=(8.2, 0.9 + 0.33 * len(methods)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (group, title) in zip(panels, PANELS.items(), strict=True):
        axes.axvline(0, color="#888888", linewidth=1, zorder=1)
        draw_marks(axes, marks[marks.name == group], methods)
        axes.set(title=title, xlabel="points above zero-shot")
        axes.set_yticks(range(len(methods)), [label(method) for method in methods])
        axes.grid(axis="x")
    handles = []
    for name, kind in KINDS.items():
        (handle,) = panels[0].plot([], [], kind.shape, color=kind.colour, label=name)
        handles.append(handle)
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7.5)
    return figure


def draw_marks(axes: Axes, marks: pd.DataFrame, methods: list[str]) -> None:
    """Draws the marks of one panel with their intervals, in points."""
    for mark in marks.itertuples():
        kind = KINDS[mark.mark]
        height = methods.index(mark.method) + mark.height
        interval = [100 * mark.gain_low, 100 * mark.gain_high]
        axes.plot(interval, [height, height], color=kind.colour, linewidth=1.2)
        axes.plot(100 * mark.gain, height, kind.shape, color=kind.colour, markersize=4)


if __name__ == "__main__":
    # Letters as paths look alike wherever the picture is read.
    with style.context("icrouting.report.report"), matplotlib.rc_context({"svg.fonttype": "path"}):
        draw().savefig(PICTURE, metadata={"Date": None, "Description": f"figures {digest()}"})
