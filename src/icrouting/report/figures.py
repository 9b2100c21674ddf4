"""Figures: a run's pictures as SVG text, drawn 5 inches wide so that they stay readable on a phone."""

import io
import itertools
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
from icrouting.report.summary import Method, Summary
from icrouting.report.wording import label

WIDTH = 5.0
# Okabe and Ito's colours, told apart with every common colour blindness; shapes repeat the distinction
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SHAPES = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#8a8a8a"
in_our_style = style.context("icrouting.report.report")


@in_our_style
def accuracies(summary: Summary) -> str:
    """Returns accuracy per task and method, with intervals and the chance level."""
    figure, axes = _per_task(summary, [method.name for method in summary.methods], "accuracy")
    for row, task in enumerate(summary.tasks):
        axes.plot(
            [100 * task.chance] * 2, [row - 0.45, row + 0.45], color=GREY, linestyle=":", zorder=1
        )
    axes.set_xlabel("accuracy, % (dotted line: chance)")
    return _svg(figure)


@in_our_style
def gains(summary: Summary) -> str:
    """Returns the change against zero-shot per task and method; filled where significant."""
    figure, axes = _per_task(
        summary, [method.name for method in summary.methods if method.name != BASELINE], "gain"
    )
    axes.axvline(0, color="black", linewidth=1, zorder=1)
    axes.set_xlabel(f"points above {BASELINE} (filled: significant)")
    return _svg(figure)


@in_our_style
def costs(summary: Summary, n_cached: Mapping[str, int]) -> str:
    """Returns mean accuracy against time, prompt tokens and numbers kept, for the methods that have every task."""
    looks, methods = _looks(summary), complete(summary)
    costs_of = {
        "ms per example": [1000 * method.seconds for method in methods],
        "prompt tokens": [method.n_tokens for method in methods],
        "numbers kept": [float(n_cached.get(method.name, 0)) for method in methods],
    }
    figure = Figure(figsize=(WIDTH, 3.2))
    panels = figure.subplots(1, len(costs_of), sharey=True)
    for axes, (title, values) in zip(panels, costs_of.items(), strict=True):
        for method, cost in zip(methods, values, strict=True):
            low, value, high = _percent(summary.line("mean", "all", method.name), "accuracy")
            axes.plot(
                [cost, cost],
                [low, high],
                color=looks[method.name]["color"],
                linewidth=1.2,
                alpha=0.6,
            )
            axes.plot(cost, value, **looks[method.name], ms=6.0)
        axes.set(xlabel=title, xlim=(0, 1.1 * max(values, default=1) or 1))
        axes.grid(True)
    panels[0].set_ylabel("mean accuracy, %")
    panels[-1].set_xscale("symlog", linthresh=100)
    panels[-1].set(xticks=[0, 1e3, 1e5, 1e7], xlim=(-60, 1e8))
    _legend(figure, {method.name: looks[method.name] for method in methods})
    return _svg(figure)


def complete(summary: Summary) -> list[Method]:
    """Returns the methods that have records of every task."""
    n_tasks, means = len(summary.groups["all"]), summary.lines.accuracy_n
    return [method for method in summary.methods if means["mean", "all", method.name] == n_tasks]


@in_our_style
def routing(layers: Sequence[int], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns heat maps of each task's `head_gates` [n_layers, n_heads] and `routing_vector_abs` [n_layers, rank]."""
    maps = {
        name: (np.array(t["head_gates"]), np.array(t["routing_vector_abs"]))
        for name, t in tasks.items()
    }
    top = max(float(weights.max()) for _, weights in maps.values()) or 1.0
    figure = Figure(figsize=(WIDTH, 0.5 + len(maps) * (1.1 + 0.06 * len(layers))))
    rows = figure.subplots(len(maps), 2, squeeze=False, sharex="col", sharey=True)
    for (gate_axes, weight_axes), (name, (gates, weights)) in zip(rows, maps.items(), strict=True):
        _heat(gate_axes, gates, layers, 1.0)
        _heat(weight_axes, weights, layers, top)
        gate_axes.set(title=f"{name}: head gates", ylabel="layer")
        weight_axes.set(title="|routing vector|")
    rows[-1][0].set_xlabel("head")
    rows[-1][1].set_xlabel("direction")
    return _svg(figure)


@in_our_style
def training(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the loss and its regularisers over the steps, one of `rows` each."""
    panels = {
        "loss": ("loss", "ce"),
        "regularisers, before their weights": ("conf", "spar", "gate"),
    }
    steps = pd.DataFrame(rows)
    figure = Figure(figsize=(WIDTH, 1.9 * len(panels)))
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, terms) in zip(grid, panels.items(), strict=True):
        for term, colour in zip(terms, COLOURS[1:], strict=False):
            axes.plot(steps.step, steps[term], color=colour, alpha=0.25, linewidth=0.7)
            smooth = steps[term].rolling(max(1, len(steps) // 20), min_periods=1).mean()
            axes.plot(steps.step, smooth, color=colour, label=term)
        axes.set_title(title)
        axes.legend(ncols=len(terms), loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0)
    grid[-1].set_xlabel("step")
    return _svg(figure)


@in_our_style
def confusions(summary: Summary, method: str) -> str:
    """Returns a method's confusion matrices, one a task that has them, as percentages of each label's items."""
    found = {task: counts for task, counts in summary.cells(method).confusion.items() if counts}
    n_rows = -(-len(found) // 3)
    figure = Figure(figsize=(WIDTH, 0.4 + 1.75 * n_rows))
    for place, (task, confusion) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(n_rows, 3, place)
        counts = np.array(confusion, dtype=float)
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set(title=task, xticks=range(len(counts)), yticks=range(len(counts)))
        for row, column in np.argwhere(shares >= 1):
            share, look = shares[row, column], {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{share:.0f}", color="white" if share > 55 else "black", **look)
    figure.supxlabel("predicted option", fontsize=9)
    figure.supylabel("right option", fontsize=9)
    return _svg(figure)


def _per_task(summary: Summary, methods: Sequence[str], name: str) -> tuple[Figure, Axes]:
    """Dots with interval bars, a band per task; an insignificant gain's dot is empty."""
    tasks, looks = summary.tasks, _looks(summary)
    step = 0.8 / max(1, len(methods))
    figure = Figure(figsize=(WIDTH, 0.9 + len(tasks) * max(0.36, 0.13 * len(methods) + 0.06)))
    axes = figure.subplots()
    for row, task in enumerate(tasks):
        for place, method in enumerate(methods):
            cell = summary.line("task", task.name, method)
            if cell is not None and cell[f"{name}_n"]:
                height = row + step * (place + 0.5) - 0.4
                low, value, high = _percent(cell, name)
                fill = looks[method]["color"] if name == "accuracy" or cell.direction else "white"
                axes.plot(
                    [low, high], [height, height], color=looks[method]["color"], linewidth=1.2
                )
                axes.plot(value, height, **looks[method], mfc=fill, ms=4.5)
    for row, (above, below) in enumerate(itertools.pairwise(tasks), start=1):
        is_border = above.section != below.section
        axes.axhline(
            row - 0.5, color=GREY if is_border else "#e4e4e4", linewidth=1 if is_border else 0.6
        )
    axes.set_yticks(
        range(len(tasks)), [f"{task.name}\n({task.section})" for task in tasks], fontsize=8
    )
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(True, axis="x")
    axes.tick_params(top=True, labeltop=True)
    _legend(figure, {method: looks[method] for method in methods})
    return figure, axes


def _looks(summary: Summary) -> dict[str, dict[str, Any]]:
    """Colour and shape of each method's dots, the same in every picture."""
    shapes = [SHAPES[(i + i // len(COLOURS)) % len(SHAPES)] for i in range(len(summary.methods))]
    dots = zip(summary.methods, itertools.cycle(COLOURS), shapes, strict=False)
    return {
        method.name: {"color": colour, "marker": shape, "linestyle": "none"}
        for method, colour, shape in dots
    }


def _legend(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    handles = [
        figure.axes[0].plot([], [], label=label(name), **look, ms=5.0)[0]
        for name, look in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)


def _percent(line: Any, name: str) -> tuple[float, float, float]:
    return 100 * line[f"{name}_low"], 100 * line[name], 100 * line[f"{name}_high"]


def _heat(
    axes: Axes, values: Float[np.ndarray, "n_layers columns"], layers: Sequence[int], top: float
) -> None:
    """Draws one heat map with its scale, the deepest layer on top."""
    edges = (-0.5, values.shape[1] - 0.5, -0.5, len(layers) - 0.5)
    image = axes.imshow(
        values, cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower", extent=edges
    )
    ticks = range(0, len(layers), max(1, len(layers) // 4))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.figure.colorbar(image, ax=axes, aspect=12, pad=0.02)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
