"""Draws who-wins.svg, the gains of every method from the reports under benchmarks/results: python docs/who_wins.py."""

import hashlib
import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from icrouting.conclusion import label

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "who-wins.svg"
# By kind of mark its colour, its shape, and the runs that it is drawn from, with how methods' names end there.
KINDS = {
    "no fit, or one router (few-shot: 3 draws)": ("#000000", "o", {"smollm2-135m": ""}),
    "fitted once on the source tasks (three seeds)": ("#0072B2", "D", {"smollm2-135m-rivals-once": "-once"}),
    "fitted on each task (left: 3 seeds; right: 2)": (
        "#D55E00",
        "s",
        {
            "smollm2-135m-rivals-in-domain-sources": "",
            "smollm2-135m-rivals-in-domain": "",
            "smollm2-135m-rivals-in-domain-seed-1": "",
        },
    ),
}
# On the source tasks the pooled run is drawn, whose first seed was fitted anew.
UNSEEN_ALONE = ("smollm2-135m-rivals-in-domain", "smollm2-135m-rivals-in-domain-seed-1")
# How far above its method's line each run's mark is drawn; the pooled run and the first seed's are in different panels.
OFFSETS = dict(zip(KINDS, ((0,), (0.22,), (-0.04, -0.04, -0.3)), strict=True))
NOT_FITTED = ("icr", "few-shot", "multi-task-few-shot", "calibration")
PANELS = {"source": "the five source tasks", "unseen": "the other seven tasks"}


def files() -> list[Path]:
    """The reports that are drawn."""
    return [ROOT / "benchmarks" / "results" / run / "report.csv" for _, _, runs in KINDS.values() for run in runs]


def gains() -> pd.DataFrame:
    """Returns a line for each mark: its kind, place among its kind's runs, group, method, and gain in points."""
    found = []
    for kind, (_, _, runs) in KINDS.items():
        for place, (run, ending) in enumerate(runs.items()):
            lines = pd.read_csv(ROOT / "benchmarks" / "results" / run / "report.csv").query("kind == 'mean'")
            panels = ["unseen"] if run in UNSEEN_ALONE else list(PANELS)
            lines = lines[lines.name.isin(panels) & lines.gain.notna() & lines.method.str.endswith(ending)]
            method = lines.method.str.removesuffix(ending) if ending else lines.method
            is_drawn = method.isin(NOT_FITTED) == (kind == next(iter(KINDS)))
            found.append(lines.assign(method=method, mark=kind, place=place)[is_drawn])
    return pd.concat(found)


def digest() -> str:
    """Returns what the picture names its figures, and how they are drawn, by."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in (Path(__file__), *files()))).hexdigest()[:16]


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
            height = methods.index(line.method) + OFFSETS[line.mark][line.place]
            axes.plot([100 * line.gain_low, 100 * line.gain_high], [height] * 2, color=colour, linewidth=1.2)
            axes.plot(100 * line.gain, height, shape, color=colour, markersize=4)
        axes.set(title=title, xlabel="points above zero-shot")
        axes.set_yticks(range(len(methods)), list(map(label, methods)))
        axes.grid(axis="x")
    handles = [panels[0].plot([], [], shape, color=colour, label=kind)[0] for kind, (colour, shape, _) in KINDS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7.5)
    return figure


if __name__ == "__main__":
    with style.context("icrouting.report"), matplotlib.rc_context({"svg.fonttype": "path"}):
        draw().savefig(PICTURE, metadata={"Date": None, "Description": f"figures {digest()}"})
