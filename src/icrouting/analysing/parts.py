"""Parts: each analysis by name, as a function of a study and as pictures of its tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from icrouting.analysing import (
    direction_pictures,
    further_pictures,
    prompt_pictures,
    routing_pictures,
)
from icrouting.analysing.attention import attention, check_rows
from icrouting.analysing.cost import cost
from icrouting.analysing.directions import check_draws, directions
from icrouting.analysing.few_shot import few_shot
from icrouting.analysing.importance import importance
from icrouting.analysing.intervention import intervention
from icrouting.analysing.pictures import Picture
from icrouting.analysing.space import space
from icrouting.analysing.study import Study
from icrouting.analysing.tokens import tokens


@dataclass(frozen=True)
class Part:
    """An analysis.

    Attributes:
        title: heads its section of the page.
        tables: computes it.
        pictures: draws its tables.
        settings: what of the configuration it depends on, beside what all parts do.
        shows_demos: whether it runs few-shot prompts of the test rows.
        check: asks, before any pass, whether it can be computed.
    """

    title: str
    tables: Callable[[Study], dict[str, pd.DataFrame]]
    pictures: Callable[[Mapping[str, pd.DataFrame]], list[Picture]]
    settings: tuple[str, ...] = ()
    shows_demos: bool = False
    check: Callable[[Study], None] | None = None


ANALYSES = {
    "importance": Part("What the router asks for", importance, routing_pictures.importance),
    "intervention": Part(
        "What is lost without it",
        intervention,
        routing_pictures.intervention,
        settings=("per_layer",),
    ),
    "few-shot": Part(
        "Does routing do what demonstrations do?",
        few_shot,
        prompt_pictures.few_shot,
        shows_demos=True,
    ),
    "attention": Part(
        "Does attention move as demonstrations move it?",
        attention,
        prompt_pictures.attention,
        shows_demos=True,
        check=check_rows,
    ),
    "directions": Part(
        "What tasks share",
        directions,
        direction_pictures.directions,
        settings=("n_prompts",),
        check=check_draws,
    ),
    "tokens": Part(
        "Which words become likelier",
        tokens,
        further_pictures.tokens,
        shows_demos=True,
    ),
    "space": Part(
        "Where prompts lie, and what they foretell",
        space,
        further_pictures.space,
        shows_demos=True,
    ),
    "cost": Part("What it costs", cost, further_pictures.cost),
}
