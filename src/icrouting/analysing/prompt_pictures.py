"""What the parts few-shot and attention look like, with a sentence of figures each."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from icrouting.analysing import pictures
from icrouting.analysing.pictures import Marks, Picture, or_dash
from icrouting.analysing.study import MEAN

# Frames, whose columns no type checker knows.
Tables = Mapping[str, Any]


def marks_of(lines: Any, name: str, factor: float = 1) -> Marks:
    """Returns a column and its interval as marks."""
    columns = (name, f"{name}_low", f"{name}_high")
    return Marks(*((factor * lines[column]).tolist() for column in columns))


def few_shot(tables: Tables) -> list[Picture]:
    """Returns the pictures of how near routing comes to few-shot prompts."""
    pairs = tables["pairs"]
    return [
        _divergence(pairs, "vocabulary"),
        _divergence(pairs, "options"),
        _agreement(pairs),
        _accuracies(tables["accuracies"], tables["changes"]),
    ]


def _divergence(pairs: Any, scope: str) -> Picture:
    lines = pairs[(pairs.scope == scope) & (pairs["first"] == "few-shot")]
    tasks = list(lines.task.unique())
    series = {}
    for second in ("zero-shot", "routed"):
        series[second] = marks_of(lines[lines.second == second], "kl")
    mean = lines[lines.task == MEAN].set_index("second").kl
    plain = mean["zero-shot"]
    share = 100 * (1 - mean["routed"] / plain) if plain > 0 else float("nan")
    says = f"Few-shot prompts are {plain:.2f} nats from zero-shot and {mean['routed']:.2f} from "
    says += f"routed ones: routing closes {share:.0f} % of the way, mean over tasks."
    if not share >= 0:
        says = f"Few-shot prompts are {plain:.2f} nats from zero-shot and {mean['routed']:.2f} "
        says += "from routed ones: routing does not come nearer to them, mean over tasks."
    if np.isnan(plain):
        says = "Some task's options share their first tokens: there is no mean over tasks."
    where = "over the vocabulary" if scope == "vocabulary" else "among the options"
    return Picture(
        f"Distance from the few-shot answer, {where}",
        pictures.dots(tasks, series, f"KL(few-shot ‖ ·) of the next token, {where}, nats"),
        says,
        "To the left: nearer to what the same prompt is answered behind demonstrations. Bars are "
        "95 % intervals over prompts.",
        "pairs",
    )


def _agreement(pairs: Any) -> Picture:
    lines = pairs[(pairs["first"] == "few-shot") & (pairs.scope == "options")]
    tasks = list(lines.task.unique())
    series = {}
    for second in ("zero-shot", "routed"):
        series[second] = marks_of(lines[lines.second == second], "agreement", 100)
    mean = 100 * lines[lines.task == MEAN].set_index("second").agreement
    return Picture(
        "Same option as few-shot",
        pictures.dots(tasks, series, "prompts answered as few-shot answers them, %", zero=False),
        f"Zero-shot answers {or_dash(mean['zero-shot'], '.0f')} % of prompts as few-shot does, "
        f"routed {or_dash(mean['routed'], '.0f')} %, mean over tasks.",
        "To the right: more prompts get the option that few-shot prompts get, right or wrong.",
        "pairs",
    )


def _accuracies(accuracies: Any, changes: Any) -> Picture:
    tasks = list(accuracies.task.unique())
    series = {}
    for prompt, lines in accuracies.groupby("prompt", sort=False):
        series[str(prompt)] = marks_of(lines, "accuracy", 100)
    cosine = changes[(changes.task == MEAN)].set_index("scope").cosine
    return Picture(
        "Accuracy of these prompts",
        pictures.dots(tasks, series, "accuracy, %", zero=False),
        f"What routing adds to log-probabilities points as what demonstrations add by a cosine of "
        f"{or_dash(cosine['vocabulary'])} over the vocabulary and {or_dash(cosine['options'])} "
        "among the "
        "options (1: the same change; 0: nothing to do with it), mean over tasks.",
        "For orientation: few prompts, wide intervals; `icr eval` measures accuracy.",
        "accuracies",
    )


def attention(tables: Tables) -> list[Picture]:
    """Returns the pictures of how much attention moves, and whether alike."""
    table = tables["attention"]
    mean = table.groupby("layer")[
        ["routing_within", "demonstrations_within", "demonstrations_get", "routing"]
    ].mean()
    layers = mean.index.tolist()
    first = int(table[table.is_routed].layer.min())
    routed = mean.loc[first:]
    moved = Picture(
        "Attention moved, layer by layer",
        pictures.lines(
            {
                "by routing, within the query": (layers, mean.routing_within.tolist()),
                "by demonstrations, within it": (layers, mean.demonstrations_within.tolist()),
                "that demonstrations get": (layers, mean.demonstrations_get.tolist()),
            },
            "layer, counted from the input (shaded: routed)",
            "share of attention (total variation)",
            y_from=0.0,
            marked_from=first - 0.5,
        ),
        f"In the layers from {first} on routing moves {100 * routed.routing_within.mean():.1f} % "
        "of the attention among the query's own tokens, demonstrations "
        f"{100 * routed.demonstrations_within.mean():.1f} %, and they get "
        f"{100 * routed.demonstrations_get.mean():.0f} % of all attention for themselves.",
        "Rows of the query's tokens, the same in both prompts; mean over tasks, heads and tokens. "
        "Below the routed layers routing can move nothing.",
        "attention",
    )
    return [moved, _alike(table, first)]


def _alike(table: Any, first: int) -> Picture:
    routed = table[table.layer >= first]
    series = {}
    bands = {}
    for task, lines in routed.groupby("task", sort=False):
        series[str(task)] = (lines.layer.tolist(), lines.alike.tolist())
        bands[str(task)] = (lines.alike_low.tolist(), lines.alike_high.tolist())
    mean = routed.alike.mean()
    clear = int((routed.alike_low > 0).sum())
    return Picture(
        "Does attention move alike?",
        pictures.lines(
            series,
            "layer, counted from the input",
            "correlation of the two changes",
            bands=bands,
        ),
        f"The correlation of what routing and what demonstrations change is {or_dash(mean)} in "
        f"the mean over layers and tasks; it is above 0 by more than noise in {clear} of "
        f"{len(routed)} layers and tasks, where one in forty would be by chance.",
        "1: routing moves attention among the query's tokens as demonstrations do; 0: it has "
        "nothing to do with it. Bands are 95 % intervals over prompts.",
        "attention",
    )
