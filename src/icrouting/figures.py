"""Figures: a run's pictures as SVG text, drawn 5 inches wide so that they stay readable on a phone."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icrouting.conclusion import label
from icrouting.metrics import Estimate
from icrouting.summary import BASELINE, Cell, Summary

WIDTH = 5.0
# Okabe and Ito's colours, told apart with every common colour blindness; shapes repeat the distinction
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SHAPES = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#8a8a8a"


def accuracies(summary: Summary) -> str:
    """Returns accuracy per task and method, with intervals and the chance level."""

    def draw(axes: Axes) -> None:
        for row, task in enumerate(summary.tasks):
            axes.plot([100 * task.chance] * 2, [row - 0.45, row + 0.45], color=GREY, linestyle=":", zorder=1)
        axes.set_xlabel("accuracy, % (dotted line: chance)")

    return _per_task(summary, [m.name for m in summary.methods], draw, lambda cell: (cell.accuracy, True))


def gains(summary: Summary) -> str:
    """Returns the change against zero-shot per task and method; filled where significant."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        axes.set_xlabel(f"points above {BASELINE} (filled: significant)")

    def change(cell: Cell) -> tuple[Estimate, bool] | None:
        return (cell.gain.change, cell.gain.direction != 0) if cell.gain else None

    return _per_task(summary, [m.name for m in summary.methods if m.name != BASELINE], draw, change)


def costs(summary: Summary, n_cached: Mapping[str, int]) -> str:
    """Returns mean accuracy against time, prompt tokens and numbers kept, for the methods that have every task."""
    looks = _looks(summary)
    means = {mean.method: mean.accuracy for mean in summary.means if mean.group == "all"}
    methods = [method for method in summary.methods if means[method.name].n == len(summary.groups["all"])]
    costs_of = {
        "ms per example": [1000 * method.seconds for method in methods],
        "prompt tokens": [method.n_tokens for method in methods],
        "numbers kept": [float(n_cached.get(method.name, 0)) for method in methods],
    }

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(costs_of), sharey=True)
        for axes, (title, values) in zip(panels, costs_of.items(), strict=True):
            for method, cost in zip(methods, values, strict=True):
                low, value, high = _percent(means[method.name])
                axes.plot([cost, cost], [low, high], color=looks[method.name][0], linewidth=1.2, alpha=0.6)
                axes.plot(cost, value, **_marker(looks[method.name], is_filled=True, size=6.0))
            axes.set(xlabel=title, xlim=(0, 1.1 * max(values, default=1) or 1))
            axes.grid(True)
        panels[0].set_ylabel("mean accuracy, %")
        panels[-1].set_xscale("symlog", linthresh=100)
        panels[-1].set_xticks([0, 1e3, 1e5, 1e7])
        panels[-1].set_xlim(-60, 1e8)
        _legend(figure, looks, [method.name for method in methods])

    return _svg((WIDTH, 3.2), draw)


def routing(layers: Sequence[int], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns heat maps of the head gates and of |routing vector|, a row per task.

    Args:
        layers: the routed layers.
        tasks: by name, `head_gates` [n_layers, n_heads] and `routing_vector_abs` [n_layers, rank].
    """
    maps = {name: (np.array(t["head_gates"]), np.array(t["routing_vector_abs"])) for name, t in tasks.items()}
    top = max(float(weights.max()) for _, weights in maps.values()) or 1.0

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(maps), 2, squeeze=False, sharex="col", sharey=True)
        for (gate_axes, weight_axes), (name, (gates, weights)) in zip(rows, maps.items(), strict=True):
            images = _heat(gate_axes, gates, layers, 1.0), _heat(weight_axes, weights, layers, top)
            gate_axes.set(title=f"{name}: head gates", ylabel="layer")
            weight_axes.set(title="|routing vector|")
            for axes, image in zip((gate_axes, weight_axes), images, strict=True):
                figure.colorbar(image, ax=axes, aspect=12, pad=0.02)
        rows[-1][0].set_xlabel("head")
        rows[-1][1].set_xlabel("direction")

    return _svg((WIDTH, 0.5 + len(maps) * (1.1 + 0.06 * len(layers))), draw)


def training(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the loss and its regularisers over the steps, one of `rows` each."""
    panels = {"loss": ("loss", "ce"), "regularisers, before their weights": ("conf", "spar", "gate")}
    steps = np.array([row["step"] for row in rows])

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True)
        for axes, (title, terms) in zip(grid, panels.items(), strict=False):
            for term, colour in zip(terms, COLOURS[1:], strict=False):
                values = np.array([row[term] for row in rows], dtype=np.float64)
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
                axes.plot(steps, _smooth(values), color=colour, label=term)
            axes.set_title(title)
            axes.legend(ncols=len(terms), loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0)
        grid[-1].set_xlabel("step")

    return _svg((WIDTH, 1.9 * len(panels)), draw)


def confusions(summary: Summary, method: str) -> str:
    """Returns a method's confusion matrices, one a task, as percentages of each label's items."""
    cells = [cell for cell in summary.cells if cell.method == method]
    n_rows = -(-len(cells) // 3)

    def draw(figure: Figure) -> None:
        for place, cell in enumerate(cells):
            axes = figure.add_subplot(n_rows, 3, place + 1)
            counts = np.array(cell.confusion, dtype=float)
            shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
            axes.set(title=cell.task, xticks=range(len(counts)), yticks=range(len(counts)))
            for row, column in np.argwhere(shares >= 1):
                share, look = shares[row, column], {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(column, row, f"{share:.0f}", color="white" if share > 55 else "black", **look)
        figure.supxlabel("predicted option", fontsize=9)
        figure.supylabel("right option", fontsize=9)

    return _svg((WIDTH, 0.4 + 1.75 * n_rows), draw)


def _per_task(
    summary: Summary,
    methods: Sequence[str],
    draw_frame: Callable[[Axes], None],
    estimate: Callable[[Cell], tuple[Estimate, bool] | None],
) -> str:
    """Dots with interval bars, a band per task; `estimate` gives a figure and whether its dot is filled."""
    looks = _looks(summary)
    step = 0.8 / max(1, len(methods))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_frame(axes)
        for row, task in enumerate(summary.tasks):
            for place, method in enumerate(methods):
                cell = summary.cell(method, task.name)
                found = estimate(cell) if cell else None
                if found:
                    height = row + step * (place + 0.5) - 0.4
                    low, value, high = _percent(found[0])
                    axes.plot([low, high], [height, height], color=looks[method][0], linewidth=1.2)
                    axes.plot(value, height, **_marker(looks[method], found[1], size=4.5))
        for row in range(1, len(summary.tasks)):
            is_border = summary.tasks[row].section != summary.tasks[row - 1].section
            axes.axhline(row - 0.5, color=GREY if is_border else "#e4e4e4", linewidth=1 if is_border else 0.6)
        names = [f"{task.name}\n({task.section})" for task in summary.tasks]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(True, axis="x")
        axes.tick_params(top=True, labeltop=True)
        _legend(figure, looks, methods)

    return _svg((WIDTH, 0.9 + len(summary.tasks) * max(0.36, 0.13 * len(methods) + 0.06)), draw)


def _looks(summary: Summary) -> dict[str, tuple[str, str]]:
    """Colour and shape of each method, the same in every picture."""
    names = [method.name for method in summary.methods]
    return {
        name: (COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]) for i, name in enumerate(names)
    }


def _marker(look: tuple[str, str], is_filled: bool, size: float) -> dict[str, Any]:
    colour, shape = look
    fill = colour if is_filled else "white"
    return {"color": colour, "marker": shape, "ms": size, "mfc": fill, "linestyle": "none"}


def _legend(figure: Figure, looks: Mapping[str, tuple[str, str]], methods: Sequence[str]) -> None:
    axes = figure.axes[0]
    handles = [axes.plot([], [], label=label(m), **_marker(looks[m], is_filled=True, size=5.0))[0] for m in methods]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)


def _percent(estimate: Estimate) -> tuple[float, float, float]:
    return 100 * estimate.low, 100 * estimate.value, 100 * estimate.high


def _heat(axes: Axes, values: Float[np.ndarray, "n_layers columns"], layers: Sequence[int], top: float) -> Any:
    """Draws one heat map, the deepest layer on top."""
    edges = (-0.5, values.shape[1] - 0.5, -0.5, len(layers) - 0.5)
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower", extent=edges)
    ticks = range(0, len(layers), max(1, len(layers) // 4))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return image


def _smooth(values: Float[np.ndarray, "steps"]) -> Float[np.ndarray, "steps"]:
    """Running mean over 5 % of the steps, the ones before."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(values)
    sums[window:] -= sums[:-window].copy()
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def _svg(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    with style.context("icrouting.report"):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
