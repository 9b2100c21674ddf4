"""The model card that goes with every saved router."""

import re
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

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
    values["front_matter"] = _front_matter(description.base_model)
    return resources.files("icrouting").joinpath("card.md").read_text(encoding="utf-8").format(**values)


def _front_matter(base_model: str) -> str:
    """The line that names the base model, where it is a hub id: the hub refuses a card that names anything else."""
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return ""
    return f"base_model: {base_model}\n" if "/" in base_model else ""


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    found = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{card.rstrip()}\n\n{section}"
    rest = card[found.end() :]
    return card[: found.start()] + section + ("\n" + rest if rest else "")
