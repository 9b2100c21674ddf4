"""Draws the README's picture of how routing works: python docs/picture.py docs/how-it-works.svg."""

import sys

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Of Okabe and Ito's colours: blue is the fit, orange its use, green what is computed.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#555555"


def box(axes, x, y, width, height, text, colour):
    """Draws a rounded box around a text; `x` and `y` are its lower left corner."""
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", lw=1.4
    )
    # 18 is the opacity, in hexadecimal: a tenth, so that the text stands out.
    patch.set(edgecolor=colour, facecolor=colour + "18")
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)


def arrow(axes, start, end, colour, bend=0.0):
    """Draws an arrow, bent to one side where `bend` is not 0."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=11,
        color=colour,
        connectionstyle=f"arc3,rad={bend}",
    )
    axes.add_patch(patch)


def draw() -> Figure:
    """Returns the picture: the fit above, its use on a task below."""
    figure = Figure(figsize=(8.6, 4.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.6), ylim=(0, 6.3))
    axes.axis("off")
    draw_fit(axes)
    draw_use(axes)
    # What is fitted goes into what is used.
    arrow(axes, (10.6, 4.25), (6.0, 3.35), BLUE, 0.12)
    return figure


def draw_fit(axes):
    """Draws the three stages of a fit, from left to right."""
    axes.text(0.2, 5.95, "fit, once", fontsize=11, fontweight="bold", color=BLUE)
    box(axes, 0.2, 4.3, 2.5, 1.2, "few-shot prompts\nof a few tasks", BLUE)
    box(axes, 3.5, 4.3, 2.7, 1.2, "frozen model:\nlast token's queries\nand keys, per layer", BLUE)
    box(axes, 7.0, 4.3, 2.2, 1.2, "PCA: top r\ndirections\n$U_q, U_k$", BLUE)
    box(axes, 10.0, 4.3, 2.4, 1.2, "train the router\non zero-shot\nprompts", BLUE)
    arrow(axes, (2.75, 4.9), (3.45, 4.9), BLUE)
    arrow(axes, (6.25, 4.9), (6.95, 4.9), BLUE)
    arrow(axes, (9.25, 4.9), (9.95, 4.9), BLUE)


def draw_use(axes):
    """Draws how a prompt is routed, from left to right, and the equation below."""
    axes.text(0.2, 3.45, "use, on any task", fontsize=11, fontweight="bold", color=ORANGE)
    box(axes, 0.2, 1.7, 2.5, 1.3, "zero-shot prompt\n“Review: …\nSentiment:”", ORANGE)
    box(axes, 3.5, 2.35, 2.7, 0.95, "sentence encoder\n+ router", ORANGE)
    box(axes, 7.0, 2.35, 2.2, 0.95, "routing vector $\\alpha$\nhead gates $\\gamma$", ORANGE)
    box(axes, 3.5, 0.35, 8.9, 1.35, "", GREEN)
    bias = r"$\gamma_h \,(Q U_q)\,\mathrm{diag}(\alpha)\,(K U_k)^{\top}\,)\; V$"
    formula = r"$\mathrm{softmax}\,($ scaling $\cdot\, Q_h K^{\top}$ + mask + " + bias
    axes.text(7.95, 1.22, formula, ha="center", va="center", fontsize=11)
    note = (
        "last third of the layers; computed as r extra columns of every head, "
        "so any kernel and cache will do"
    )
    axes.text(7.95, 0.66, note, ha="center", va="center", fontsize=7.6, color=GREY)
    arrow(axes, (2.75, 2.6), (3.45, 2.8), ORANGE)
    arrow(axes, (6.25, 2.82), (6.95, 2.82), ORANGE)
    arrow(axes, (8.1, 2.3), (8.9, 1.75), ORANGE)
    arrow(axes, (2.75, 1.9), (3.45, 1.2), ORANGE)


if __name__ == "__main__":
    # A fixed salt names the parts alike, and paths need no font: the same picture everywhere.
    with matplotlib.rc_context({"svg.hashsalt": "icrouting", "svg.fonttype": "path"}):
        draw().savefig(sys.argv[1], metadata={"Date": None})
