"""Intervention: what is lost where one layer, head or direction is switched off.

A gate that is open is no effect: what it lets through may be nothing. So each unit is switched off
for all prompts, and the next token's distribution is held against the whole router's. The laws:
switching off nothing changes nothing, and switching off everything is zero-shot, both by 0.0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from icrouting.analysing.importance import direction_importance, head_importance, most_important
from icrouting.analysing.passes import kl, routed_passes
from icrouting.analysing.study import Study, with_interval
from icrouting.routing.router import Routing
from icrouting.runtime.progress import track

NOTHING = "nothing"
EVERYTHING = "everything"


@dataclass(frozen=True)
class Unit:
    """What is switched off.

    Attributes:
        kind: "nothing", "layer", "head", "direction" or "everything".
        place: of its layer among the routed ones; -1 for nothing and everything.
        number: of the head or direction in its layer; -1 for others.
    """

    kind: str
    place: int = -1
    number: int = -1

    def switched_off(self, routing: Routing) -> Routing:
        """Returns a routing without this unit."""
        alpha = routing.routing_vector.clone()
        gates = routing.head_gates.clone()
        if self.kind == EVERYTHING:
            alpha[:] = 0
        elif self.kind == "layer":
            alpha[:, self.place] = 0
        elif self.kind == "direction":
            alpha[:, self.place, self.number] = 0
        elif self.kind == "head":
            gates[:, self.place, self.number] = 0
        return Routing(alpha, gates)


def units_of(routing: Routing, per_layer: int) -> list[Unit]:
    """Returns what is switched off: nothing, everything, each layer, and units of each layer.

    Args:
        routing: what the router decides for all prompts.
        per_layer: heads and directions of a layer, those that count for most; 0: all of them.
    """
    units = [Unit(NOTHING), Unit(EVERYTHING)]
    heads = head_importance(routing)
    directions = direction_importance(routing)
    for place in range(routing.head_gates.shape[1]):
        units.append(Unit("layer", place))
        units += [Unit("head", place, n) for n in most_important(heads[place], per_layer)]
        units += [Unit("direction", place, n) for n in most_important(directions[place], per_layer)]
    return units


def intervention(study: Study) -> dict[str, pd.DataFrame]:
    """Returns a table, a line for each unit that is switched off and each task.

    `kl` is KL(whole router || without the unit) of the next token, in nats, `kl_zero_shot` is
    KL(zero-shot || without the unit); `accuracy` is that without the unit and `lost` by how much
    the whole router's is higher, both as shares. Means over items, with 95 % bootstrap intervals;
    in the lines of `MEAN` tasks weigh alike.
    """
    lines = []
    units = units_of(study.routing, study.config.per_layer)
    with routed_passes(study.decoder, study.icr.pids, study.queries) as (plain, run):
        whole = run(study.routing)
        right = study.is_right(whole)
        for unit in track(units, "intervention", [1] * len(units), "units"):
            without = run(unit.switched_off(study.routing))
            lines += _lines(study, unit, plain, whole, without, right)
    return {"intervention": pd.DataFrame(lines)}


def _lines(
    study: Study, unit: Unit, plain: Tensor, whole: Tensor, without: Tensor, right: np.ndarray
) -> Iterator[dict]:
    right_without = study.is_right(without)
    values_by_name = {
        "kl": kl(whole, without).numpy(),
        "kl_zero_shot": kl(plain, without).numpy(),
        "accuracy": right_without,
        "lost": right - right_without,
    }
    for task, groups in study.groups.items():
        line = {
            "task": task,
            "off": unit.kind,
            "layer": study.layers[unit.place] if unit.place >= 0 else -1,
            "number": unit.number,
            "n": sum(map(len, groups)),
        }
        for name, values in values_by_name.items():
            line |= with_interval(name, [values[rows] for rows in groups])
        yield line
