"""Figures: a run's pictures as SVG text."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icrouting.evaluation.records import BASELINE
from icrouting.report.rows import Row
from icrouting.report.summary import Method, Summary
from icrouting.report.wording import label

# In inches: what stays readable on a phone.
WIDTH = 5.0
# Okabe and Ito's colours are told apart with every common colour blindness. Shapes repeat the
# distinction, for prints in grey.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SHAPES = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#8a8a8a"
PALE_GREY = "#e4e4e4"
in_our_style = style.context("icrouting.report.report")


@in_our_style
def accuracies(summary: Summary) -> str:
    """Returns accuracy per task and method, with intervals and the chance level."""
    methods = [method.name for method in summary.methods]
    figure, axes = _per_task(summary, methods, "accuracy")
    for place, task in enumerate(summary.tasks):
        level = 100 * task.chance
        band = [place - 0.45, place + 0.45]
        axes.plot([level, level], band, color=GREY, linestyle=":", zorder=1)
    axes.set_xlabel("accuracy, % (dotted line: chance)")
    return _svg(figure)


@in_our_style
def gains(summary: Summary) -> str:
    """Returns the change against zero-shot per task and method; filled where significant."""
    methods = [method.name for method in summary.methods if method.name != BASELINE]
    figure, axes = _per_task(summary, methods, "gain")
    axes.axvline(0, color="black", linewidth=1, zorder=1)
    axes.set_xlabel(f"points above {BASELINE} (filled: significant)")
    return _svg(figure)


@in_our_style
def costs(summary: Summary, n_cached: Mapping[str, int]) -> str:
    """Returns mean accuracy against time, prompt tokens and numbers kept.

    Only methods that have every task are drawn: the others' means are over other tasks.

    Args:
        summary: the run's figures.
        n_cached: numbers kept beside the model, by method; a method that is missing keeps none.
    """
    methods = complete(summary)
    looks = _looks(summary)
    costs_by_title = {
        "ms per example": [1000 * method.seconds for method in methods],
        "prompt tokens": [method.n_tokens for method in methods],
        "numbers kept": [float(n_cached.get(method.name, 0)) for method in methods],
    }
    figure = Figure(figsize=(WIDTH, 3.2))
    panels = figure.subplots(1, len(costs_by_title), sharey=True)
    for axes, (title, method_costs) in zip(panels, costs_by_title.items(), strict=True):
        for method, cost in zip(methods, method_costs, strict=True):
            look = looks[method.name]
            low, value, high = _percent(summary.line("mean", "all", method.name), "accuracy")
            axes.plot([cost, cost], [low, high], color=look["color"], linewidth=1.2, alpha=0.6)
            axes.plot(cost, value, **look, ms=6.0)
        # An axis without length, where all costs are 0, would be refused.
        right_end = 1.1 * max(method_costs, default=1) or 1
        axes.set(xlabel=title, xlim=(0, right_end))
        axes.grid(True)
    panels[0].set_ylabel("mean accuracy, %")
    # Numbers kept span seven orders of magnitude and may be 0, which a plain logarithm cannot show.
    panels[-1].set_xscale("symlog", linthresh=100)
    panels[-1].set(xticks=[0, 1e3, 1e5, 1e7], xlim=(-60, 1e8))
    _legend(figure, {method.name: looks[method.name] for method in methods})
    return _svg(figure)


def complete(summary: Summary) -> list[Method]:
    """Returns the methods that have records of every task."""
    n_tasks = len(summary.groups["all"])
    n_scored = summary.lines.accuracy_n
    return [method for method in summary.methods if n_scored["mean", "all", method.name] == n_tasks]


@in_our_style
def routing(layers: Sequence[int], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns heat maps of each task's routing, a row a task.

    Args:
        layers: the routed layers, counted from the input.
        tasks: by name `head_gates` [n_layers, n_heads] and `routing_vector_abs` [n_layers, rank].
    """
    gates = {name: np.array(task["head_gates"]) for name, task in tasks.items()}
    weights = {name: np.array(task["routing_vector_abs"]) for name, task in tasks.items()}
    # One scale for all tasks, so that they can be compared; gates have theirs from 0 to 1.
    largest_weight = max(float(task_weights.max()) for task_weights in weights.values()) or 1.0
    row_height = 1.1 + 0.06 * len(layers)
    figure = Figure(figsize=(WIDTH, 0.5 + len(tasks) * row_height))
    rows = figure.subplots(len(tasks), 2, squeeze=False, sharex="col", sharey=True)
    for (gate_axes, weight_axes), name in zip(rows, tasks, strict=True):
        _heat(gate_axes, gates[name], layers, 1.0)
        _heat(weight_axes, weights[name], layers, largest_weight)
        gate_axes.set(title=f"{name}: head gates", ylabel="layer")
        weight_axes.set(title="|routing vector|")
    rows[-1][0].set_xlabel("head")
    rows[-1][1].set_xlabel("direction")
    return _svg(figure)


@in_our_style
def training(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the loss and its regularisers over the steps, one of `rows` each.

    Where the router was judged on validation rows, their loss stands beside.
    """
    terms_by_title = {
        "loss": ("loss", "ce"),
        "regularisers, before their weights": ("conf", "spar", "gate"),
    }
    steps = pd.DataFrame(rows)
    # Single steps are noisy: a running mean over 5 % of them shows the trend.
    n_smoothed = max(1, len(steps) // 20)
    figure = Figure(figsize=(WIDTH, 1.9 * len(terms_by_title)))
    panels = figure.subplots(len(terms_by_title), 1, sharex=True)
    for axes, (title, terms) in zip(panels, terms_by_title.items(), strict=True):
        for term, colour in zip(terms, COLOURS[1:], strict=False):
            trend = steps[term].rolling(n_smoothed, min_periods=1).mean()
            axes.plot(steps.step, steps[term], color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(steps.step, trend, color=colour, label=term)
        n_lines = len(terms)
        if "loss" in terms and "validation_loss" in steps:
            looks = steps.dropna(subset=["validation_loss"])
            axes.plot(
                looks.step, looks.validation_loss, color=COLOURS[4], marker="o", label="validation"
            )
            n_lines += 1
        axes.set_title(title)
        axes.legend(ncols=n_lines, loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0)
    panels[-1].set_xlabel("step")
    return _svg(figure)


@in_our_style
def confusions(summary: Summary, method: str) -> str:
    """Returns a method's confusion matrices, one a task that has them.

    Shares are percentages of each label's items.
    """
    matrices = {}
    for task, counts in summary.cells(method).confusion.items():
        if counts:
            matrices[task] = np.array(counts, dtype=float)
    n_rows = math.ceil(len(matrices) / 3)
    figure = Figure(figsize=(WIDTH, 0.4 + 1.75 * n_rows))
    for place, (task, counts) in enumerate(matrices.items(), start=1):
        axes = figure.add_subplot(n_rows, 3, place)
        axes.set(title=task, xticks=range(len(counts)), yticks=range(len(counts)))
        # A label without items has a row of zeros.
        label_sizes = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        _matrix(axes, 100 * counts / label_sizes)
    figure.supxlabel("predicted option", fontsize=9)
    figure.supylabel("right option", fontsize=9)
    return _svg(figure)


def _matrix(axes: Axes, shares: Float[np.ndarray, "n_options n_options"]) -> None:
    """Draws a confusion matrix with its shares, in %, written in."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(shares >= 1):
        share = shares[row, column]
        # Black cannot be read on the dark blues.
        colour = "white" if share > 55 else "black"
        axes.text(column, row, f"{share:.0f}", color=colour, ha="center", va="center", fontsize=7)


def _per_task(summary: Summary, methods: Sequence[str], name: str) -> tuple[Figure, Axes]:
    """Dots with interval bars for the estimate `name`, a band per task."""
    tasks = summary.tasks
    looks = _looks(summary)
    band_height = max(0.36, 0.13 * len(methods) + 0.06)
    figure = Figure(figsize=(WIDTH, 0.9 + len(tasks) * band_height))
    axes = figure.subplots()
    # A band is 1 high, of which the methods share 0.8, so that bands stay apart.
    step = 0.8 / max(1, len(methods))
    for row, task in enumerate(tasks):
        for place, method in enumerate(methods):
            cell = summary.line("task", task.name, method)
            if cell is not None and cell[f"{name}_n"]:
                height = row + step * (place + 0.5) - 0.4
                _dot(axes, cell, name, height, looks[method])
    _bands(axes, tasks)
    axes.grid(True, axis="x")
    # A long figure is read from either end.
    axes.tick_params(top=True, labeltop=True)
    _legend(figure, {method: looks[method] for method in methods})
    return figure, axes


def _dot(axes: Axes, cell: Any, name: str, height: float, look: Mapping[str, Any]) -> None:
    """Draws one estimate with its interval; an insignificant gain's dot is empty."""
    low, value, high = _percent(cell, name)
    colour = look["color"]
    is_full = name == "accuracy" or cell.direction
    axes.plot([low, high], [height, height], color=colour, linewidth=1.2)
    axes.plot(value, height, **look, mfc=colour if is_full else "white", ms=4.5)


def _bands(axes: Axes, tasks: Sequence[Row]) -> None:
    """Names the tasks, the first on top, with stronger lines between sections than within."""
    for place, (above, below) in enumerate(itertools.pairwise(tasks), start=1):
        if above.section != below.section:
            axes.axhline(place - 0.5, color=GREY, linewidth=1)
        else:
            axes.axhline(place - 0.5, color=PALE_GREY, linewidth=0.6)
    titles = [f"{task.name}\n({task.section})" for task in tasks]
    axes.set_yticks(range(len(tasks)), titles, fontsize=8)
    axes.set_ylim(len(tasks) - 0.5, -0.5)


def _looks(summary: Summary) -> dict[str, dict[str, Any]]:
    """Colour and shape of each method's dots, the same in every picture."""
    looks = {}
    for place, method in enumerate(summary.methods):
        n_rounds, colour = divmod(place, len(COLOURS))
        # With every round of the colours the shapes move on by one, so that no look comes twice
        # among 49 methods.
        shape = (place + n_rounds) % len(SHAPES)
        looks[method.name] = {
            "color": COLOURS[colour],
            "marker": SHAPES[shape],
            "linestyle": "none",
        }
    return looks


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds a legend over the figure; its dots are drawn without data, so that none is hollow."""
    handles = []
    for name, look in looks.items():
        (handle,) = figure.axes[0].plot([], [], label=label(name), **look, ms=5.0)
        handles.append(handle)
    figure.legend(handles=handles, loc="outside upper left", ncols=3)


def _percent(line: Any, name: str) -> tuple[float, float, float]:
    """The estimate `name` of a line, in %: its low end, its value and its high end."""
    return 100 * line[f"{name}_low"], 100 * line[name], 100 * line[f"{name}_high"]


def _heat(
    axes: Axes, values: Float[np.ndarray, "n_layers columns"], layers: Sequence[int], top: float
) -> None:
    """Draws one heat map from 0 to `top` with its scale, the deepest layer on top."""
    edges = (-0.5, values.shape[1] - 0.5, -0.5, len(layers) - 0.5)
    image = axes.imshow(
        values, cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower", extent=edges
    )
    # Some four names of layers fit.
    ticks = range(0, len(layers), max(1, len(layers) // 4))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.figure.colorbar(image, ax=axes, aspect=12, pad=0.02)


def _svg(figure: Figure) -> str:
    """The figure as SVG text, without the date: the same figures make the same picture."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
