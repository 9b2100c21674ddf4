"""The model card that goes with every saved router."""

from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING

from icrouting.config import HIDDEN

if TYPE_CHECKING:
    from icrouting.artifact import Description


def model_card(description: "Description") -> str:
    """Returns the text of a router's README.md."""
    values = {**asdict(description.fit), **asdict(description)}
    name = description.fit.encoder
    values["features"] = "the base model's own hidden state" if name == HIDDEN else f"sentence encoder `{name}`"
    values |= {"layers": ", ".join(map(str, description.layers))}
    values["tasks"] = ", ".join(f"{name} ({n_rows:,})" for name, n_rows in description.tasks.items())
    values["versions"] = ", ".join(f"{name} {number}" for name, number in description.versions.items())
    return resources.files("icrouting").joinpath("card.md").read_text(encoding="utf-8").format(**values)
