"""What a run's fits cost and what they tried (paper, table 11), read from the files it keeps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from icrouting.runtime.storage import save_text

COLUMNS = ("labelled", "trained", "forwards", "backwards", "seconds")


@dataclass(frozen=True)
class _KeptFit:
    """What the file of a fit says beside the tensors.

    `place` is what its name says beside the method: the seed, and in-domain the task.
    """

    method: str
    place: str
    cost: dict[str, Any]
    tried: list[dict[str, Any]]


def fit_costs(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each method that kept fits: how many, and the mean of each of `COLUMNS`.

    An in-domain method has a fit for every task and seed, a train-once method one for every seed.
    """
    costs = []
    for fit in _kept_fits(folder, names):
        if fit.cost:  # an earlier version counted nothing
            costs.append({"method": fit.method, **fit.cost})
    if not costs:
        return []
    rows = []
    # In the order of the names, as the report lists methods elsewhere.
    for method, costs_of_fits in pd.DataFrame(costs).groupby("method", sort=False):
        means = costs_of_fits[list(COLUMNS)].mean().to_dict()
        rows.append({"method": method, "fits": len(costs_of_fits), **means})
    return rows


def write_tried(folder: Path, names: Sequence[str], file: Path) -> None:
    """Writes a CSV: every setting that a fit tried, with its accuracy on validation rows."""
    lines = []
    for fit in _kept_fits(folder, names):
        for trial in fit.tried:
            setting = {name: value for name, value in trial.items() if name != "accuracy"}
            line = {"method": fit.method, "fit": fit.place, "setting": json.dumps(setting)}
            lines.append({**line, "accuracy": trial["accuracy"]})
    table = pd.DataFrame(lines, columns=["method", "fit", "setting", "accuracy"])
    save_text(file, table.to_csv(index=False))


def _kept_fits(folder: Path, names: Sequence[str]) -> list[_KeptFit]:
    fits = []
    for name in names:
        for file in sorted(folder.glob(f"{name}*.safetensors")):
            with safe_open(file, "pt") as opened:
                notes = opened.metadata() or {}
            # One method's name may begin another's, so the file itself says whose it is.
            if notes.get("method") != name:
                continue
            place = file.stem.removeprefix(name).removeprefix("-")
            cost = json.loads(notes.get("cost", "{}"))
            fits.append(_KeptFit(name, place, cost, json.loads(notes.get("tried", "[]"))))
    return fits
