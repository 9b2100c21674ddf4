"""The model card that goes with every saved router."""

import re
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING

from icrouting.config import HIDDEN

if TYPE_CHECKING:
    from icrouting.artifact import Description


def model_card(description: "Description", digest: str) -> str:
    """Returns the text of a router's README.md; `digest` identifies its weights."""
    values = {**asdict(description.fit), **asdict(description), "digest": digest}
    name = description.fit.encoder
    values["features"] = "the base model's own hidden state" if name == HIDDEN else f"sentence encoder `{name}`"
    values |= {"layers": ", ".join(map(str, description.layers))}
    values["tasks"] = ", ".join(f"{name} ({n_rows:,})" for name, n_rows in description.tasks.items())
    values["versions"] = ", ".join(f"{name} {number}" for name, number in description.versions.items())
    # The hub refuses a card whose front matter names anything but one of its ids.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", description.base_model)
    values["front_matter"] = f"base_model: {description.base_model}\n" if is_hub_id else ""
    return resources.files("icrouting").joinpath("card.md").read_text(encoding="utf-8").format(**values)


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    found = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{card.rstrip()}\n\n{section}"
    rest = card[found.end() :]
    return card[: found.start()] + section + ("\n" + rest if rest else "")
