"""Warm start: a fit that goes on from a router, with new tasks beside those that it knows.

Its directions are kept as they are, since its weights mean nothing along others: nothing is
extracted, and what the new tasks move outside these directions cannot be learned. Its weights are
where training begins, at the scale of alpha where its own training ended; so before the first step
the new router does to every prompt what the old one does.

Differs: the paper fits a router once, on all its tasks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from icrouting.config import FitConfig
from icrouting.routing.description import Description, Origin
from icrouting.routing.features import Features, Scale
from icrouting.routing.gate import PromptGate
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Router
from icrouting.tasks.task import Task, rows_digest

# What a router's weights and directions came of: a fit that goes on from them has no choice here.
SHAPING = (
    "layers",
    "rank",
    "basis",
    "n_prompts",
    "demos_per_class",
    "queries_per_context",
    "demo_selection",
    "extract_from",
    "pooling",
    "encoder",
    "bias_rows",
    "hidden_width",
    "final_alpha_scale",
)


@dataclass(frozen=True, eq=False)
class Start:
    """A router to go on from.

    Attributes:
        description: what it is.
        pids: its directions.
        router: its weights, which are left as they are.
        digest: 16 hex digits that identify both.
        keep: how many training queries of each task that it knows are trained on again.
        gate: which prompts it routes; None where it routes all.
    """

    description: Description
    pids: PIDs
    router: Router
    digest: str
    keep: int = 0
    gate: PromptGate | None = None

    def gate_by_task(self) -> dict[str, PromptGate]:
        """Returns a gate of each task alone that it knows; none where it routes every prompt."""
        if self.gate is None:
            return {}
        return dict(zip(self.description.tasks, self.gate.split(), strict=True))

    def settings(self, config: FitConfig) -> FitConfig:
        """Returns a fit's settings, with those that shape a router taken from this one.

        Raises:
            ValueError: one of them is neither left at its default nor this router's.
        """
        fitted = replace(self.description.fit, layers=self.description.layers)
        defaults = FitConfig()
        for name in SHAPING:
            asked = getattr(config, name)
            value = getattr(fitted, name)
            if asked not in (getattr(defaults, name), value):
                raise ValueError(
                    f"{name} is {value!r} in the router to start from and {asked!r} in this fit: "
                    f"leave {name} out, or fit without a start"
                )
        return replace(config, **{name: getattr(fitted, name) for name in SHAPING})

    def trained_tasks(self, tasks: Sequence[Task], seed: int) -> list[Task]:
        """Returns the tasks to train on: new ones whole, known ones cut to `keep` training rows.

        Known ones lose their validation rows: where these were few, this router learned from them.

        Args:
            tasks: the tasks of the fit; those whose names this router knows are rehearsed.
            seed: draws the rows that are rehearsed.

        Raises:
            ValueError: a known task and nothing to keep of it, or the other way round, or a known
                task that reads otherwise.
        """
        names = list(self.description.tasks)
        known_names = [task.name for task in tasks if task.name in names]
        if self.keep < 0:
            raise ValueError(f"keep must be 0 or more, got {self.keep}")
        if known_names and not self.keep:
            raise ValueError(
                f"the router to start from was fitted on {', '.join(known_names)} already: say "
                "with `keep` (--keep) how many of their rows are to be trained on again, or leave "
                "them out"
            )
        if self.keep and not known_names:
            raise ValueError(
                f"keep={self.keep} is of the tasks that the router was fitted on "
                f"({', '.join(names)}), and none of them is among the tasks: add their rows"
            )
        trained = []
        for task in tasks:
            if task.name not in names:
                trained.append(task)
                continue
            self._check_form(task)
            # Not the draw of the queries, nor that of the extraction.
            order = np.random.default_rng(seed + 2).permutation(len(task.train))
            rows = tuple(task.train[index] for index in order[: self.keep])
            trained.append(replace(task, train=rows, validation=()))
        return trained

    def _check_form(self, task: Task) -> None:
        """Checks that a task of a known name is the known one; earlier versions kept no form."""
        for source in self.description.sources or ():
            differences = source.differences(task.spec) if source.name == task.name else []
            if differences:
                raise ValueError(
                    f"the router to start from learned {task.name!r} from "
                    f"{'; from '.join(differences)}: give one of the two another name"
                )

    def check_features(self, features: Features) -> None:
        """ValueError where the features of a fit are not those that this router reads."""
        if features.fingerprint != self.description.encoder:
            raise ValueError(
                "the router to start from was fitted with another sentence encoder than "
                f"{self.description.fit.encoder!r} is here: expected weights "
                f"{self.description.encoder}, got {features.fingerprint}"
            )

    def scale(self, scale: Scale) -> Scale:
        """Returns the scale of features that a router is to absorb when it is trained."""
        mean, std = scale
        # A channel that says nothing in these queries is out of the training, not of the router.
        return mean, std.masked_fill(std.isinf(), 1.0)

    def put_into(self, router: Router, scale: Scale) -> None:
        """Gives a new router these weights, to be trained on features of that `scale`."""
        router.load_state_dict(self.router.state_dict())
        router.release(*scale)

    def described(self, new: Description, trained: Sequence[Task]) -> Description:
        """Returns the description of a router that went on from this one.

        Args:
            new: that of a router that was fitted on the new tasks alone.
            trained: what `trained_tasks` gave.
        """
        old = self.description
        sources = None
        if old.sources is not None and new.sources is not None:
            # The new tasks gave no direction.
            added = [replace(source, n_prompts=0, n_demos=0) for source in new.sources]
            sources = (*old.sources, *added)
        rehearsed = {task.name: len(task.train) for task in trained if task.name in old.tasks}
        return replace(
            new,
            tasks={**old.tasks, **new.tasks},
            sources=sources,
            rows=self.rows_digest(trained),
            chat_template=new.chat_template or old.chat_template,
            origin=Origin(
                weights=self.digest,
                taken={name: old.n_taken(name) for name in old.tasks},
                rehearsed=rehearsed,
            ),
        )

    def rows_digest(self, trained: Sequence[Task]) -> str:
        """Returns digits that identify all rows: this router's, and those that it goes on with."""
        text = f"{self.description.rows} {rows_digest(trained)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
