"""The routers of a run: the one without a name of its own, and those that have one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icrouting.evaluation.config import ROUTED, EvalConfig
from icrouting.icr import InContextRouter
from icrouting.methods.settings import Entrant
from icrouting.report.wording import label
from icrouting.routing.sources import Source, read_otherwise
from icrouting.tasks.task import Task

PAPER_FIT = 5000  # prompts and queries a task


@dataclass(frozen=True)
class Routers:
    """Routers of one base model.

    Attributes:
        unnamed: the one that "icr" and the methods that build on it route by.
        entrants: how the others are attached, in their order.
        named: those, by name.
    """

    unnamed: InContextRouter | None
    entrants: Sequence[Entrant]
    named: Mapping[str, InContextRouter]

    @classmethod
    def of(cls, config: EvalConfig) -> "Routers":
        """Returns the routers that an evaluation asks for.

        Raises:
            ValueError: one is not there, or they are of different base models.
        """
        loaded: dict[str, InContextRouter] = {}
        for name in (config.settings.router, *(each.router for each in config.entrants)):
            if name is not None and name not in loaded:
                loaded[name] = InContextRouter.from_pretrained(name)
        unnamed = loaded[config.settings.router] if config.settings.router else None
        named = {each.name: loaded[each.router] for each in config.entrants}
        routers = cls(unnamed, config.entrants, named)
        routers._check_one_base()
        return routers

    def _check_one_base(self) -> None:
        """ValueError where they are of different base models."""
        if self.any is None:
            return
        first = self.any.description
        first_name = next(iter(self.by_name))
        for name, icr in self.by_name.items():
            other = icr.description
            is_same = other.fingerprint == first.fingerprint
            if not is_same or other.base_weights != first.base_weights:
                raise ValueError(
                    f"routers of different base models in one run: {first_name} was fitted on "
                    f"{first.base_model}, {name} on {other.base_model}: evaluate each base model "
                    "in a run of its own"
                )

    @property
    def by_name(self) -> dict[str, InContextRouter]:
        """All of them by the name of their column."""
        unnamed = {} if self.unnamed is None else {ROUTED: self.unnamed}
        return {**unnamed, **self.named}

    @property
    def any(self) -> InContextRouter | None:
        """The first of them, for what they have in common; None where there is none."""
        return next(iter(self.by_name.values()), None)

    @property
    def identities(self) -> dict[str, str]:
        """What identifies each named router in a run."""
        identities = {}
        for entrant in self.entrants:
            identities[entrant.name] = entrant.identified_by(self.named[entrant.name].digest())
        return identities

    @property
    def task_names(self) -> list[str]:
        """The tasks that any of them was fitted on: what is unseen is so to all.

        Raises:
            ValueError: one does not say which.
        """
        names: dict[str, None] = {}
        for name, icr in self.by_name.items():
            if not icr.description.tasks:
                who = "the router" if name == ROUTED else f"the router {name}"
                raise ValueError(
                    f"{who} does not say which tasks it was fitted on: name them with --sources"
                )
            names |= dict.fromkeys(icr.description.tasks)
        return list(names)

    @property
    def sources(self) -> list[Source]:
        """What they know of their tasks, each once by its name."""
        by_name: dict[str, Source] = {}
        for icr in self.by_name.values():
            for source in icr.description.sources or ():
                by_name.setdefault(source.name, source)
        return list(by_name.values())

    def read_otherwise(self, tasks: Sequence[Task]) -> list[str]:
        """Returns a line for each task that one was fitted on with another template or options."""
        lines: dict[str, None] = {}
        for icr in self.by_name.values():
            if icr.description.sources is not None:
                lines |= dict.fromkeys(read_otherwise(icr.description.sources, tasks))
        return list(lines)

    def notes(self, tasks: Sequence[Task]) -> list[str]:
        """Returns sentences on what they learned from: less than the paper, or other tasks."""
        names_by_sentence: dict[str, list[str]] = {}
        all_tasks = {tuple(icr.description.tasks) for icr in self.by_name.values()}
        for name, icr in self.by_name.items():
            sentences = [_cut(icr), _other_chats(icr, tasks)]
            if len(all_tasks) > 1:
                sentences.append(f"learned from {', '.join(icr.description.tasks)} alone.")
            for sentence in sentences:
                if sentence:
                    names_by_sentence.setdefault(sentence, []).append(label(name))
        return [f"{', '.join(names)} {text}" for text, names in names_by_sentence.items()]


def _cut(icr: InContextRouter) -> str:
    """What a router learned from, where that is less than the paper's did."""
    description = icr.description
    counts = [description.n_taken(task) for task in description.tasks]
    # A router may not know of any task.
    n_prompts = max((n for n, _ in counts), default=description.fit.n_prompts)
    n_queries = max((n for _, n in counts), default=description.fit.n_queries)
    if min(n_prompts, n_queries) >= PAPER_FIT:
        return ""
    learned = f"{n_prompts} prompts, {n_queries} queries a task at most"
    return f"learned once, from {learned} (paper: {PAPER_FIT:,})."


def _other_chats(icr: InContextRouter, tasks: Sequence[Task]) -> str:
    """Says where tasks are asked in chats and a router learned from none, or the other way."""
    if not icr.description.sources:
        return ""
    learned = {source.chat for source in icr.description.sources}
    names = [task.name for task in tasks if task.spec.chat not in learned]
    if not names:
        return ""
    kind = "plain prompts" if learned == {False} else "chats"
    return f"learned from {kind}, and is asked otherwise: {', '.join(names)}."
