"""The model card that goes with every saved router."""

import re
from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from icrouting.config import HIDDEN

if TYPE_CHECKING:
    from icrouting.artifact import Description


def model_card(description: "Description", digest: str) -> str:
    """Returns the text of a router's README.md; `digest` identifies its weights."""
    # The hub refuses a card whose front matter names anything but one of its ids.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", description.base_model)
    template = resources.files("icrouting").joinpath("card.md.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return page.render(vars(description), digest=digest, is_hub_id=is_hub_id, hidden=HIDDEN)


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    found = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{card.rstrip()}\n\n{section}"
    rest = card[found.end() :]
    return card[: found.start()] + section + ("\n" + rest if rest else "")
