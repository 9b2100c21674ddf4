"""Draws ladder.svg: what a few labels give at zero-shot length, beside few-shot prompts.

python docs/ladder.py
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icrouting.runtime.storage import load_json

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "ladder.svg"
FOLDER = ROOT / "benchmarks" / "results" / "few-labels"
MODELS = {"SmolLM2-135M": "smollm2-135m.json", "Qwen2.5-Coder-1.5B": "qwen2.5-coder-1.5b.json"}
# From what takes nothing to what takes most, top to bottom.
RUNGS = {
    "calibrated": "64 prompts, no label: calibrated",
    "residual 4": "4 labels a class: probe-residual",
    "distilled": "5, and 256 prompts: probe-distilled",
    "residual 8": "8 labels a class: probe-residual",
    "residual 16": "16",
    "residual 32": "32",
    "few-shot": "few-shot prompts, 5 a class (long)",
}
COLOURS = {"few-shot": "#D55E00", "calibrated": "#000000"}
COLOUR = "#0072B2"


def files() -> list[Path]:
    """Returns the records that the picture is drawn from."""
    return [FOLDER / name for name in MODELS.values()]


def digest() -> str:
    """Returns digits that identify the records and the code."""
    content = hashlib.sha256(Path(__file__).read_bytes())
    for file in files():
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def drawn() -> str:
    """Returns the digits that the committed picture was drawn from."""
    found = re.search(r"drawn from (\w{16})", PICTURE.read_text())
    return found[1] if found else ""


def draw() -> None:
    """Draws the picture."""
    matplotlib.rcParams["svg.hashsalt"] = "ladder"
    with style.context("icrouting.report.report"):
        figure = Figure(figsize=(7.2, 3.4))
        panels = figure.subplots(1, len(MODELS), sharey=True)
        for axes, (model, name) in zip(panels, MODELS.items(), strict=True):
            lines = load_json(FOLDER / name)["summary"]["all"]
            _panel(axes, lines)
            axes.set_title(f"{model}, {lines['few-shot']['tasks']} tasks", fontsize=9)
        panels[0].set_yticks(range(len(RUNGS)), list(RUNGS.values()))
        panels[0].invert_yaxis()
        figure.supxlabel("points of accuracy over zero-shot, 95 % interval over items", fontsize=8)
        figure.savefig(PICTURE, metadata={"Date": None, "Description": f"drawn from {digest()}"})


def _panel(axes: Axes, lines: dict[str, Any]) -> None:
    """Draws one model's rungs."""
    for row, way in enumerate(RUNGS):
        # A rung that was not measured on a model has no mark.
        if way not in lines:
            continue
        gap = lines[way]["over zero-shot"]
        colour = COLOURS.get(way, COLOUR)
        axes.plot([gap["low"], gap["high"]], [row, row], color=colour, linewidth=1.5)
        axes.plot(gap["value"], row, "s" if way == "few-shot" else "o", color=colour)
    axes.axvline(0, color="black", linewidth=1, zorder=1)
    axes.grid(True, axis="x")


if __name__ == "__main__":
    draw()
