"""Draws gains.svg and gains-dark.svg: what the main methods gain on three models.

python docs/gains.py
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import MODELS, RESULTS, mean_of

ROOT = Path(__file__).parents[1]
PANELS = {"source": "the five source tasks", "unseen": "the seven unseen tasks"}
# Of each model: the method's name, its run's folder and how the run calls it.
MARKS = {
    "smollm2-135m": [
        ("ICR", "smollm2-135m", "icr"),
        ("prefix tuning, fitted once", "smollm2-135m-rivals-once", "prefix-tuning-once"),
        ("few-shot prompts", "smollm2-135m", "few-shot"),
    ],
    "qwen2.5-coder-0.5b": [
        ("ICR", "qwen2.5-coder-0.5b", "icr"),
        ("prefix tuning, fitted once", "qwen2.5-coder-0.5b-rivals-once", "prefix-tuning-once"),
        ("few-shot prompts", "qwen2.5-coder-0.5b-shots", "few-shot"),
    ],
    "qwen2.5-coder-1.5b": [
        ("ICR", "qwen2.5-coder-1.5b", "icr"),
        ("few-shot prompts", "qwen2.5-coder-1.5b", "few-shot"),
    ],
}


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, light or dark."""

    ground: str
    ink: str
    faint: str
    methods: dict[str, str]


SHAPES = {"ICR": "o", "prefix tuning, fitted once": "D", "few-shot prompts": "s"}
LIGHT_COLOURS = ("#0072B2", "#D55E00", "#555555")
DARK_COLOURS = ("#56B4E9", "#F0904B", "#b0b0b0")
THEMES = {
    "gains.svg": Theme(
        "#ffffff", "#222222", "#bbbbbb", dict(zip(SHAPES, LIGHT_COLOURS, strict=True))
    ),
    "gains-dark.svg": Theme(
        "#0d1117", "#e6edf3", "#4a5058", dict(zip(SHAPES, DARK_COLOURS, strict=True))
    ),
}


def digest() -> str:
    """Returns a digest of the figures and of how they are drawn, which the pictures carry."""
    runs = dict.fromkeys(run for marks in MARKS.values() for _, run, _ in marks)
    files = [Path(__file__), *(RESULTS / run / "report.csv" for run in runs)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def drawn() -> list[str]:
    """Returns the digests that the pictures as they lie there were made of."""
    texts = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in THEMES]
    return [re.findall(r"figures ([0-9a-f]{16})", text)[0] for text in texts]


def draw(theme: Theme) -> Figure:
    """Returns the picture: fitted and unseen tasks side by side, a line a model and method."""
    figure = Figure(figsize=(8.2, 3.3), facecolor=theme.ground)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (group, title) in zip(panels, PANELS.items(), strict=True):
        draw_panel(axes, group, theme)
        axes.set_title(title, color=theme.ink)
        axes.set_xlabel("points above zero-shot", color=theme.ink)
    heights = [-4 * place - 1 for place in range(len(MARKS))]
    panels[0].set_yticks(heights, [MODELS[model] for model in MARKS])
    handles = [
        panels[0].plot([], [], shape, color=theme.methods[name], label=name)[0]
        for name, shape in SHAPES.items()
    ]
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    legend.get_frame().set(facecolor=theme.ground, edgecolor=theme.ground)
    return figure


def draw_panel(axes: Axes, group: str, theme: Theme) -> None:
    """Draws the gains on one group of tasks with their intervals, in points."""
    axes.set_facecolor(theme.ground)
    axes.axvline(0, color=theme.ink, linewidth=1, zorder=1)
    for place, marks in enumerate(MARKS.values()):
        for row, (name, run, method) in enumerate(marks):
            line = mean_of(run, method, group)
            height = -4 * place - row
            colour = theme.methods[name]
            ends = [100 * line.gain_low, 100 * line.gain_high]
            axes.plot(ends, [height, height], color=colour, linewidth=1.6)
            axes.plot(100 * line.gain, height, SHAPES[name], color=colour, markersize=6)
    axes.set_xlim(-11, 22)
    axes.tick_params(colors=theme.ink)
    axes.grid(visible=True, axis="x", color=theme.faint, linewidth=0.5)
    for side in axes.spines.values():
        side.set_color(theme.faint)


if __name__ == "__main__":
    # Letters as paths look alike wherever the picture is read.
    with style.context("icrouting.report.report"), matplotlib.rc_context({"svg.fonttype": "path"}):
        for name, theme in THEMES.items():
            picture = draw(theme)
            picture.savefig(
                ROOT / "docs" / name,
                facecolor=theme.ground,
                metadata={"Date": None, "Description": f"figures {digest()}"},
            )
