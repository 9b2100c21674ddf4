"""Draws unseen.svg: what a prior from unlabelled prompts gives, by their number.

python docs/unseen.py
"""

import hashlib
import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icrouting.runtime.storage import load_json

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "unseen.svg"
FILES = {
    "SmolLM2-135M, 30 tasks": "smollm2-135m.json",
    "Qwen2.5-Coder-1.5B, 29 tasks": "qwen2.5-coder-1.5b.json",
}
WAYS = {"raw": "#000000", "batch": "#D55E00", "guarded": "#0072B2"}
LABELS = {"natural": "-", "0.8": "--"}
NAMES = {
    "raw": "as the model answers",
    "batch": "batch calibration",
    "guarded": "guarded",
    "natural": "labels as they come",
    "0.8": "one label 80 % of the rows",
}


def files() -> list[Path]:
    """Returns the records that the picture is drawn from."""
    folder = ROOT / "benchmarks" / "results" / "calibrating"
    return [folder / name for name in FILES.values()]


def digest() -> str:
    """Returns a digest of the figures and of how they are drawn, which the picture carries."""
    content = b"".join(file.read_bytes() for file in (Path(__file__), *files()))
    return hashlib.sha256(content).hexdigest()[:16]


def drawn() -> str:
    """Returns the digest of the figures that the picture as it lies there was made of."""
    return re.findall(r"figures ([0-9a-f]{16})", PICTURE.read_text())[0]


def draw() -> Figure:
    """Returns the picture: a panel a model."""
    figure = Figure(figsize=(8.2, 3.4))
    panels = figure.subplots(1, len(FILES))
    for axes, title, file in zip(panels, FILES, files(), strict=True):
        content = load_json(file)
        # The title says how many tasks there are.
        assert f" {len(content['tasks'])} " in title, file
        draw_lines(axes, pd.DataFrame(content["records"]))
        axes.set(title=title, xlabel="prompts without labels", ylabel="accuracy, %")
    for name, colour in WAYS.items():
        panels[0].plot([], [], color=colour, label=NAMES[name])
    for name, line in LABELS.items():
        panels[0].plot([], [], line, color="#888888", label=NAMES[name])
    figure.legend(loc="outside upper left", ncols=5, fontsize=7.5)
    return figure


def draw_lines(axes: Axes, records: pd.DataFrame) -> None:
    """Draws the accuracy of each way of calibrating, for each kind of labels."""
    for kind, line in LABELS.items():
        for way, colour in WAYS.items():
            chosen = records[(records["labels"] == kind) & (records["way"] == way)]
            axes.plot(chosen["prompts"], 100 * chosen["accuracy"], line, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 16, 64, 300], ["4", "16", "64", "300"])
    axes.grid(axis="y")


if __name__ == "__main__":
    # Letters as paths look alike wherever the picture is read.
    with style.context("icrouting.report.report"), matplotlib.rc_context({"svg.fonttype": "path"}):
        draw().savefig(PICTURE, metadata={"Date": None, "Description": f"figures {digest()}"})
