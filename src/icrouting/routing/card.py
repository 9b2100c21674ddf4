"""The card: what a router's README.md says of it, and the results that are recorded there."""

import re
from collections.abc import Sequence

from icrouting.config import HIDDEN
from icrouting.routing.description import Description
from icrouting.runtime.pages import markdown_cell, render

# Answers of a task that a card shows.
_N_ANSWERS = 10


def model_card(description: Description, digest: str) -> str:
    """Returns the text of a router's README.md; `digest` identifies its weights."""
    # The hub refuses a card whose front matter names anything but one of its ids.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", description.base_model)
    filters = {
        "literal": repr,
        "cell": _cell,
        "code": _code,
        "answers": _answers,
        "thousands": "{:,}".format,
    }
    sources = description.sources or ()
    return render(
        "routing/templates/card.md.j2",
        filters,
        **vars(description),
        n_taken=description.n_taken,
        sources_by_name={source.name: source for source in sources},
        # What was left out of them is not counted.
        at_most=", at most" if description.fit.skip_nan else "",
        digest=digest,
        is_hub_id=is_hub_id,
        hidden=HIDDEN,
    )


def _cell(text: str) -> str:
    """Returns a text for a cell of a table, its line breaks as they are written in Python."""
    return markdown_cell(text.replace("\n", r"\n"))


def _code(text: str) -> str:
    """Returns a text as code in a cell of a table."""
    fence = "`` " if "`" in text else "`"
    return f"{fence}{_cell(text)}{fence[::-1]}"


def _answers(options: Sequence[str]) -> str:
    """Returns options in a cell of a table, the first of them where they are many."""
    shown = ", ".join(_cell(option) for option in options[:_N_ANSWERS])
    return shown if len(options) <= _N_ANSWERS else f"{shown}, ... ({len(options)})"


def with_results(card: str, results: str) -> str:
    """Returns a card whose section "Results" holds `results` alone, at its end if it had none."""
    section = f"## Results\n\n{results.strip()}\n"
    # The section ends at the next one, or with the card.
    old = re.search(r"^## Results$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if old is None:
        return f"{card.rstrip()}\n\n{section}"
    before = card[: old.start()]
    after = card[old.end() :]
    if after:
        section += "\n"
    return before + section + after
