"""Importance: which layers, heads and directions the router uses on each task.

    layer l       mean gate * mean |alpha|      means over prompts and over heads or directions
    head h        mean gate_h * mean |alpha|
    direction r   mean gate * mean |alpha_r|

The layers' is the paper's, which shows it with the smallest at 0 and the largest at 1 (min-max).
It says what the router asks for and not what comes of it: `intervention` does.
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.analysing.study import Study
from icrouting.routing.router import Routing


def layer_importance(routing: Routing) -> Float[Tensor, "n_layers"]:
    """Returns the importance of each layer for some prompts, the paper's, before its min-max."""
    gates = routing.head_gates.mean((0, 2))
    return gates * routing.routing_vector.abs().mean((0, 2))


def head_importance(routing: Routing) -> Float[Tensor, "n_layers n_heads"]:
    """Returns the importance of each head for some prompts."""
    return routing.head_gates.mean(0) * routing.routing_vector.abs().mean((0, 2))[:, None]


def direction_importance(routing: Routing) -> Float[Tensor, "n_layers rank"]:
    """Returns the importance of each direction for some prompts."""
    return routing.routing_vector.abs().mean(0) * routing.head_gates.mean((0, 2))[:, None]


def routing_of(study: Study, task: str) -> Routing:
    """Returns what the router decides for the items of a task."""
    rows = study.rows_of(task)
    return Routing(study.routing.routing_vector[rows], study.routing.head_gates[rows])


def importance(study: Study) -> dict[str, pd.DataFrame]:
    """Returns tables of layers and of their units (heads and directions), a line each by task.

    `share` is the min-max of a task's layers: 0 for the least important one, 1 for the most; NaN
    where all are alike. `is_top` marks the most important head and direction of a layer.
    """
    layers = []
    units = []
    for task in study.task_names:
        routing = routing_of(study, task)
        by_layer = layer_importance(routing)
        least = by_layer.min()
        spread = by_layer.max() - least
        for place, layer in enumerate(study.layers):
            share = float((by_layer[place] - least) / spread) if spread > 0 else float("nan")
            value = float(by_layer[place])
            layers.append({"task": task, "layer": layer, "importance": value, "share": share})
        kinds = {"head": head_importance(routing), "direction": direction_importance(routing)}
        for kind, values in kinds.items():
            units += _lines(task, kind, study.layers, values)
    return {"layers": pd.DataFrame(layers), "units": pd.DataFrame(units)}


def _lines(
    task: str, kind: str, layers: tuple[int, ...], values: Float[Tensor, "n_layers n"]
) -> list[dict]:
    lines = []
    for layer, row in zip(layers, values, strict=True):
        top = int(row.argmax())
        for number, value in enumerate(row.tolist()):
            lines.append(
                {
                    "task": task,
                    "kind": kind,
                    "layer": layer,
                    "number": number,
                    "importance": value,
                    "is_top": number == top,
                }
            )
    return lines


def most_important(values: Float[Tensor, "n"], n: int) -> list[int]:
    """Returns the numbers of the `n` largest, the largest first; of all, where `n` is 0."""
    order = torch.argsort(values, descending=True, stable=True).tolist()
    return order[: n or None]
