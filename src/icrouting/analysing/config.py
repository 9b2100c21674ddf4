"""What a user asks an analysis for; light, so that `--help` comes at once."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from pydantic import NonNegativeInt, PositiveInt

from icrouting.runtime.checks import check, known

# The parts of the page by name, in the order in which it shows them, and what each is about.
PARTS = {
    "importance": "which layers, heads and directions routing uses",
    "intervention": "what is lost without one layer, head or direction",
    "few-shot": "whether the next token is distributed as behind demonstrations",
    "attention": "whether attention moves as demonstrations move it",
    "directions": "which directions tasks share, and how stable they are",
    "tokens": "which words routing makes likelier on every task",
    "space": "where prompts lie in the space of routings",
    "cost": "what a prompt costs, beside demonstrations",
}


@dataclass(frozen=True)
class AnalysisConfig:
    """What to analyse; each field is an option of `icr analyse`.

    Attributes:
        data: "hub", a folder with NAME/train.jsonl and NAME/test.jsonl, or "pinned:staicc".
        tasks: Tasks whose test rows are asked: names, or task files of your own (my-task.toml).
            None: those that the router was fitted on. Others, by name, count as unseen.
        parts: What to analyse; None: all of it. The parts: importance (which layers, heads and
            directions routing uses), intervention (what is lost without one of them), few-shot
            (is the next token distributed as behind demonstrations?), attention (does it move as
            demonstrations move it?), directions (what tasks share, and how stable it is), tokens
            (words that become likelier on every task), space (a map of routings), cost (FLOP and
            numbers kept against demonstrations).
        n_test: Test rows of each task (all, where it has fewer): few say little, see the
            intervals, and time grows with them.
        n_prompts: Few-shot prompts of training rows of each task, which "directions" looks at.
        per_layer: Heads and directions of each layer that "intervention" switches off, those that
            count for most first; 0: all of them.
        seed: Draws demonstrations.
    """

    data: str = "hub"
    tasks: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME ...]")] = None
    parts: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PART ...]")] = None
    n_test: PositiveInt = 16
    n_prompts: PositiveInt = 24
    per_layer: NonNegativeInt = 1
    seed: NonNegativeInt = 0

    def __post_init__(self):
        check(self)
        for name in self.parts or ():
            known("part", name, PARTS)
        for name, names in (("tasks", self.tasks), ("parts", self.parts)):
            if names is not None and not names:
                raise ValueError(f"{name}: name one or more, or leave the option out")

    @property
    def chosen(self) -> list[str]:
        """The parts that are asked for, in the page's order."""
        return [name for name in PARTS if self.parts is None or name in self.parts]
