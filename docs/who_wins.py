"""Draws who-wins.svg, the gains of every method from the reports under benchmarks/results: python docs/who_wins.py."""

import hashlib
import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from icrouting.report.wording import label

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "who-wins.svg"
PANELS = {"source": "the five source tasks", "unseen": "the other seven tasks"}
# By kind of mark its colour, its shape, and the runs that it is drawn from: how methods' names end there, how far above
# a method's line its mark is drawn, and in which panels. On the source tasks that is the run of three seeds.
KINDS = {
    "no fit, or one router (few-shot: 3 draws)": (
        "#000000",
        "o",
        {"smollm2-135m": ("", 0, PANELS)},
    ),
    "fitted once on the source tasks (three seeds)": (
        "#0072B2",
        "D",
        {"smollm2-135m-rivals-once": ("-once", 0.22, PANELS)},
    ),
    "fitted on each task (left: 3 seeds; right: 2)": (
        "#D55E00",
        "s",
        {
            "smollm2-135m-rivals-in-domain-sources": ("", -0.04, ["source"]),
            "smollm2-135m-rivals-in-domain": ("", -0.04, ["unseen"]),
            "smollm2-135m-rivals-in-domain-seed-1": ("", -0.3, ["unseen"]),
        },
    ),
}
NOT_FITTED = ("icr", "few-shot", "multi-task-few-shot", "calibration")


def files() -> list[Path]:
    """The reports that are drawn."""
    return [
        ROOT / "benchmarks" / "results" / run / "report.csv"
        for _, _, runs in KINDS.values()
        for run in runs
    ]


def gains() -> pd.DataFrame:
    """Returns a line for each mark: its kind, run, height above its method's line, group, method, and gain."""
    found = []
    for kind, (_, _, runs) in KINDS.items():
        for run, (ending, height, panels) in runs.items():
            lines = pd.read_csv(ROOT / "benchmarks" / "results" / run / "report.csv").query(
                "kind == 'mean'"
            )
            lines = lines[
                lines.name.isin(panels) & lines.gain.notna() & lines.method.str.endswith(ending)
            ]
            method = lines.method.str.removesuffix(ending) if ending else lines.method
            is_drawn = method.isin(NOT_FITTED) == (kind == next(iter(KINDS)))
            found.append(lines.assign(method=method, mark=kind, run=run, height=height)[is_drawn])
    return pd.concat(found)


def digest() -> str:
    """Returns what the picture names its figures, and how they are drawn, by."""
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in (Path(__file__), *files()))
    ).hexdigest()[:16]


def drawn() -> str:
    """Returns the digest of the figures that the picture as it lies there was made of."""
    return re.findall(r"figures ([0-9a-f]{16})", PICTURE.read_text())[0]


def draw() -> Figure:
    lines = gains()
    means = lines[lines.name == "source"].groupby("method").gain.max()
    methods = means.sort_values().index.tolist()
    figure = Figure(figsize=(8.2, 0.9 + 0.33 * len(methods)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        axes.axvline(0, color="#888888", linewidth=1, zorder=1)
        for line in lines[lines.name == name].itertuples():
            colour, shape, _ = KINDS[line.mark]
            height = methods.index(line.method) + line.height
            axes.plot(
                [100 * line.gain_low, 100 * line.gain_high],
                [height] * 2,
                color=colour,
                linewidth=1.2,
            )
            axes.plot(100 * line.gain, height, shape, color=colour, markersize=4)
        axes.set(title=title, xlabel="points above zero-shot")
        axes.set_yticks(range(len(methods)), list(map(label, methods)))
        axes.grid(axis="x")
    handles = [
        panels[0].plot([], [], shape, color=colour, label=kind)[0]
        for kind, (colour, shape, _) in KINDS.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7.5)
    return figure


if __name__ == "__main__":
    with style.context("icrouting.report.report"), matplotlib.rc_context({"svg.fonttype": "path"}):
        draw().savefig(PICTURE, metadata={"Date": None, "Description": f"figures {digest()}"})
