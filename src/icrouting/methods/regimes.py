"""The two regimes of a method that learns: fitted on every task that it is tested on, or once, on the sources."""

import zlib
from collections.abc import Callable
from urllib.parse import quote

import numpy as np

from icrouting.methods.base import Method
from icrouting.methods.settings import Settings
from icrouting.tasks.task import Task

ONCE = "-once"


class InDomain(Method):
    """A method fitted on the training and validation rows of the very task, when it first meets it.

    Differs: the paper reuses what was learned in-domain on unseen tasks, whose labels this one sees: a harder rival.
    The draw of a task does not depend on the tasks met before, so a resumed run finds the same.
    """

    def __init__(self, settings: Settings, kind: type[Method]):
        super().__init__(settings)
        self.name, self.draws, self._kind = kind.name, kind.draws, kind
        self._fitted: dict[tuple[int, str], Method] = {}

    def on(self, task: Task) -> Method:
        """Returns the task's own method."""
        key = self.entropy, task.name
        if key not in self._fitted:
            method = self._kind(self.settings)
            rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
            place = quote(task.name, safe="")  # a name may hold a slash
            file = self.file.with_stem(f"{self.file.stem}-{place}") if self.file else None
            method.fit_on(self.decoder, [task], rng, file)
            self._fitted[key] = method
        return self._fitted[key]


def once(kind: type[Method]) -> type[Method]:
    """Returns the kind of a method that is fitted on the pooled source tasks and used unchanged on any task."""
    return type(f"{kind.__name__}Once", (kind,), {"name": f"{kind.name}{ONCE}"})


def regimes(kind: type[Method]) -> dict[str, Callable[[Settings], Method]]:
    """Returns the makers of a learning method by name: as it is called, in-domain; with "-once", train-once."""
    makers = {"": lambda settings: InDomain(settings, kind), ONCE: once(kind)}
    return {
        kind.name + regime: maker for regime, maker in makers.items() if regime not in kind.lacks
    }
