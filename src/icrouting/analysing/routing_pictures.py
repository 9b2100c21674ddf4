"""What the parts importance and intervention look like, with a sentence of figures each."""

from collections.abc import Mapping
from typing import Any

from icrouting.analysing import pictures
from icrouting.analysing.intervention import EVERYTHING, NOTHING
from icrouting.analysing.pictures import Marks, Picture
from icrouting.analysing.study import MEAN

TIMES = "\N{MULTIPLICATION SIGN}"
# Frames, whose columns no type checker knows.
Tables = Mapping[str, Any]


def importance(tables: Tables) -> list[Picture]:
    """Returns the pictures of layers' importance and of the top heads."""
    layers = tables["layers"]
    units = tables["units"]
    series = {}
    for task, lines in layers.groupby("task", sort=False):
        series[str(task)] = (lines.layer.tolist(), lines.importance.tolist())
    mean = layers.groupby("layer").importance.mean()
    by_layer = Picture(
        "Layers that routing uses",
        pictures.lines(
            series, "layer, counted from the input", f"mean gate {TIMES} mean |alpha|", y_from=0
        ),
        f"The router asks most of layer {mean.idxmax()} ({mean.max():.2g}) and least of layer "
        f"{mean.idxmin()} ({mean.min():.2g}), mean over tasks.",
        "Higher: the layer's gates are wider open and its routing vector longer. This is what the "
        "router asks for; what comes of it is shown under intervention.",
        "layers",
    )
    return [by_layer, _top_heads(units)]


def _top_heads(units: Any) -> Picture:
    tops = units[(units.kind == "head") & units.is_top]
    numbers = tops.pivot(index="task", columns="layer", values="number")
    numbers = numbers.loc[tops.task.unique()]
    values = tops.pivot(index="task", columns="layer", values="importance").loc[numbers.index]
    n_alike = int((numbers.nunique() == 1).sum())
    texts = [[str(int(number)) for number in row] for row in numbers.to_numpy()]
    return Picture(
        "Top head of each layer",
        pictures.matrix(
            values.to_numpy(),
            [str(task) for task in numbers.index],
            [str(layer) for layer in numbers.columns],
            f"importance: mean gate of the head {TIMES} mean |alpha|",
            texts=texts,
            x_label="layer",
            low=0.0,
        ),
        f"In {n_alike} of {numbers.shape[1]} layers the same head is the most important one on "
        f"all {len(numbers)} tasks.",
        "The number in a square is the head; bright is important.",
        "units",
    )


def intervention(tables: Tables) -> list[Picture]:
    """Returns the pictures of what is lost without a layer, a head or a direction."""
    table = tables["intervention"]
    return [_divergence(table[table.task == MEAN]), _lost(table), _laws(table)]


def _divergence(mean: Any) -> Picture:
    """KL by layer; of heads and directions the one whose absence changes most."""
    layers = sorted(layer for layer in mean.layer.unique() if layer >= 0)
    series = {}
    names = {"layer": "whole layer", "head": "one head", "direction": "one direction"}
    for kind, name in names.items():
        strongest = mean[mean.off == kind].sort_values("kl").groupby("layer").last()
        lines = strongest.reindex(layers)
        series[name] = Marks(*(lines[column].tolist() for column in ("kl", "kl_low", "kl_high")))
    of_layers = mean[mean.off == "layer"].set_index("layer").kl
    everything = float(mean[mean.off == EVERYTHING].kl.iloc[0])
    return Picture(
        "What the next token loses without a layer, a head, a direction",
        pictures.dots(
            [f"layer {layer}" for layer in layers],
            series,
            "KL(whole router ‖ without it), nats, logarithmic",
            log=True,
        ),
        f"Without layer {of_layers.idxmax()} the next token's distribution moves by "
        f"{of_layers.max():.3g} nats, without the whole router by {everything:.3g} (means over "
        "tasks).",
        "To the right: more is lost. Of the heads and directions that were switched off in a layer "
        "the one is drawn whose absence changes most. Bars are 95 % intervals over prompts.",
        "intervention",
    )


def _lost(table: Any) -> Picture:
    off = table[table.off.isin(["layer", EVERYTHING])]
    order = [EVERYTHING, *sorted(layer for layer in off.layer.unique() if layer >= 0)]
    series = {}
    for is_mean, name in ((True, MEAN), (False, "hardest hit task")):
        lines = off[(off.task == MEAN) == is_mean]
        lines = lines.sort_values("lost").groupby("layer").last()
        lines = lines.reindex([-1 if row == EVERYTHING else row for row in order])
        columns = ("lost", "lost_low", "lost_high")
        series[name] = Marks(*((100 * lines[column]).tolist() for column in columns))
    mean = off[(off.task == MEAN) & (off.off == "layer")].set_index("layer")
    clear = [str(layer) for layer in mean.index[(mean.lost_low > 0) | (mean.lost_high < 0)]]
    says = "No single layer's absence moves accuracy by more than these prompts can tell from 0."
    if clear:
        says = f"Accuracy moves by more than noise, either way, without layer {', '.join(clear)}; "
        says += f"of {len(mean)} layers one in twenty would do so by chance."
    return Picture(
        "What accuracy loses without a layer",
        pictures.dots(
            ["whole router", *(f"layer {row}" for row in order[1:])],
            series,
            "accuracy lost, points",
        ),
        says if mean.lost.notna().any() else "Accuracy cannot be told: see the notes.",
        "Right of the line: the layer helps; left of it, answers are better without it. Bars are "
        "95 % intervals over prompts.",
        "intervention",
    )


def _laws(table: Any) -> Picture:
    """By task, how far the router is from zero-shot, and what its strongest layers take off it."""
    tasks = [task for task in table.task.unique() if task != MEAN]
    whole = table[table.off == NOTHING].set_index("task").kl_zero_shot
    layers = table[table.off == "layer"]
    numbers = sorted(layers.layer.unique())
    share = layers.pivot(index="task", columns="layer", values="kl").loc[tasks, numbers]
    nothing = table[table.off == NOTHING].kl.max()
    everything = table[table.off == EVERYTHING].kl_zero_shot.max()
    return Picture(
        "Which task needs which layer",
        pictures.matrix(
            share.to_numpy(),
            [f"{task} ({whole[task]:.2g})" for task in tasks],
            [str(layer) for layer in numbers],
            "KL(whole router ‖ without the layer), nats",
            x_label="layer that is switched off",
            low=0.0,
        ),
        f"Checked: switching off nothing changes {nothing:.3g} nats, and switching off everything "
        f"is {everything:.3g} nats from zero-shot.",
        "Bright: the task's next token is moved by this layer. In brackets: KL(zero-shot ‖ routed) "
        "of the whole router, in nats.",
        "intervention",
    )
