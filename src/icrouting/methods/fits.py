"""Fits: what a method learned, as a value, and the file that keeps it for a resumed run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from icrouting.runtime.storage import load_tensors, save_tensors, unshared


@dataclass(frozen=True, eq=False)
class Fit:
    """What a method learned, and what that took; `Method.take` puts it in force.

    Attributes:
        tensors: what was learned, by name.
        tried: the settings that were tried, each with its accuracy on validation rows under
            "accuracy".
        cost: "labelled" and "trained", rows run "forwards" and "backwards", "seconds".
    """

    tensors: dict[str, Tensor]
    tried: list[dict[str, Any]]
    cost: dict[str, int | float]


def save_fit(file: Path, fit: Fit, made_by: Mapping[str, str]) -> None:
    """Writes a fit, with notes of what it was made by, which `load_fit` gives back."""
    notes = {**made_by, "tried": json.dumps(fit.tried), "cost": json.dumps(fit.cost)}
    file.parent.mkdir(parents=True, exist_ok=True)
    # What is learned may be views of one tensor, which safetensors does not take.
    save_tensors(file, unshared(fit.tensors), notes)


def load_fit(file: Path) -> tuple[Fit, dict[str, str]]:
    """Returns a fit and the notes of what it was made by; ValueError if the file is damaged."""
    tensors, notes = load_tensors(file)
    # An earlier version kept neither.
    tried = json.loads(notes.get("tried", "[]"))
    cost = json.loads(notes.get("cost", "{}"))
    return Fit(tensors, tried, cost), notes
