"""What a user asks an evaluation for; light, so that `--help` comes at once."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from icrouting.decoder.backbone import Backbone
from icrouting.methods.settings import Entrant, Settings
from icrouting.runtime.checks import check
from icrouting.tasks.catalogue import PAPER_TASKS

# The paper's tasks that the hub holds: the five in-domain ones first.
HUB_TASKS = tuple(name for name in PAPER_TASKS if name != "ai2scie")
# What methods learn from where nothing is said, and no router says it.
USUAL_SOURCES = HUB_TASKS[:5]
# The method of a router without a name of its own.
ROUTED = "icr"
# How options read on the command line: names in a row, and a group's options without its prefix.
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
Base = Annotated[Backbone, tyro.conf.arg(name="")]
Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate; each field is an option of `icr eval`.

    Attributes:
        data: "hub", a folder with NAME/train.jsonl and NAME/test.jsonl, or "pinned:staicc".
        tasks: Tasks to test on: names, or task files of your own (my-task.toml).
        sources: The tasks that were learned from; the others, by name, count as unseen. None: those
            that the router was fitted on or, without one, the paper's five in-domain tasks.
        methods: What to compare; zero-shot is the baseline.
        chat: Ask every task in the model's own chat template, as `chat = true` in a task file does.
        n_test: Test items per task (all, where a task has fewer), the same for every seed.
        seeds: Each draws demonstrations and fits anew.
        skip_nan: Leave test items out on which a method's scores are not finite, and say how many,
            instead of leaving out the method's whole task.
        token_budget: Padded tokens of a forward pass: fewer take less memory. None takes what each
            kind of pass takes by itself (2,048 for scores). Another budget moves scores by
            rounding alone, so a run may go on with one.
        model: The model below.
        settings: The methods' settings below.
        entrants: Routers with names of their own, each a column beside the methods.
    """

    data: str = "hub"
    tasks: Names = HUB_TASKS
    sources: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME ...]")] = None
    methods: Names = ("zero-shot", "few-shot", "multi-task-few-shot", "calibration", "icr")
    chat: bool = False
    n_test: PositiveInt = 500
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    skip_nan: bool = False
    token_budget: PositiveInt | None = None
    model: Base = field(default_factory=Backbone)
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    # On the command line they are --router's.
    entrants: tyro.conf.Suppress[tyro.conf.Fixed[tuple[Entrant, ...]]] = ()

    def __post_init__(self):
        check(self)

    @property
    def columns(self) -> tuple[str, ...]:
        """The methods with all entrants among them.

        They come behind "icr", or in its place where it has no router of its own.
        """
        named = [entrant.name for entrant in self.entrants if entrant.name not in self.methods]
        if not named:
            return self.methods
        names = list(self.methods)
        place = names.index(ROUTED) + 1 if ROUTED in names else len(names)
        names[place:place] = named
        if self.settings.router is None:
            names = [name for name in names if name != ROUTED]
        return tuple(names)
