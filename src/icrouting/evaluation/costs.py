"""What a run's fits cost and what they tried, read back from the files that it keeps of them (paper, table 11)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from icrouting.runtime.storage import save_text

COLUMNS = ("labelled", "trained", "forwards", "backwards", "seconds")


def fit_costs(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each method that kept fits: how many, and the mean over them of what `COLUMNS` names.

    An in-domain method has a fit for every task and seed, a train-once method one for every seed.
    """
    kept = _kept(folder, names)
    costs = pd.DataFrame(
        [{"method": name, **notes["cost"]} for name, _, notes in kept if notes["cost"]]
    )
    if costs.empty:
        return []
    grouped = costs.groupby("method", sort=False)
    return [
        {"method": name, "fits": len(found), **found[list(COLUMNS)].mean().to_dict()}
        for name, found in grouped
    ]


def write_tried(folder: Path, names: Sequence[str], file: Path) -> None:
    """Writes every setting that a fit tried, with its accuracy on validation rows, as a line of a CSV."""
    tried = [
        {
            "method": name,
            "fit": stem,
            "accuracy": setting.pop("accuracy"),
            "setting": json.dumps(setting),
        }
        for name, stem, notes in _kept(folder, names)
        for setting in notes["tried"]
    ]
    save_text(
        file,
        pd.DataFrame(tried, columns=["method", "fit", "setting", "accuracy"]).to_csv(index=False),
    )


def _kept(folder: Path, names: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The method, the rest of the file's name (seed and task) and the notes of each fit that is kept."""
    found = []
    for name in names:
        for file in sorted(folder.glob(f"{name}*.safetensors")):
            with safe_open(file, "pt") as opened:
                notes = opened.metadata() or {}
            if notes.get("method") == name:
                fit = file.stem.removeprefix(name).removeprefix("-")
                found.append(
                    (
                        name,
                        fit,
                        {key: json.loads(notes.get(key, "[]")) for key in ("cost", "tried")},
                    )
                )
    return found
