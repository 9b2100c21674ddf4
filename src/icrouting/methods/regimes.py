"""The two regimes of a method that learns.

In-domain it is fitted on every task that it is tested on; train-once, on the source tasks alone.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np

from icrouting.methods.base import Method
from icrouting.methods.settings import Settings
from icrouting.tasks.task import Task, rows_digest

ONCE = "-once"


class InDomain(Method):
    """A method fitted on the training and validation rows of the very task, when it first meets it.

    Differs: the paper reuses what was learned in-domain on unseen tasks, whose labels this one
    sees: a harder rival. The draw of a task does not depend on the tasks met before, so a resumed
    run finds the same.
    """

    reads_sources = False

    def __init__(self, settings: Settings, kind: type[Method]):
        super().__init__(settings)
        self.name = kind.name
        self.draws = kind.draws
        self._kind = kind
        # By the seed's entropy and the task's name: evaluations come back to tasks and seeds. Tasks
        # may share a name, so each stands beside its method.
        self._fitted: dict[tuple[int, str], list[tuple[Task, Method]]] = {}

    def on(self, task: Task) -> Method:
        """Returns the task's own method."""
        fitted = self._fitted.setdefault((self.entropy, task.name), [])
        for known_task, method in fitted:
            if known_task.teaches_like(task):
                return method
        method = self._kind(self.settings)
        # By the task's name, not by the order in which tasks are met.
        rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
        method.fit_on(self.decoder, [task], rng, self._file_of(task, is_namesake=bool(fitted)))
        fitted.append((task, method))
        return method

    def _file_of(self, task: Task, *, is_namesake: bool) -> Path | None:
        """Where the fit on a task is kept: beside where this method's own would be."""
        if self.file is None:
            return None
        # A name may hold a slash.
        place = quote(task.name, safe="")
        if is_namesake:
            place += f"-{rows_digest([task])}"
        return self.file.with_stem(f"{self.file.stem}-{place}")


def once(kind: type[Method]) -> type[Method]:
    """Returns the kind of a method that is fitted once, on the pooled source tasks.

    It is used unchanged on any task.
    """
    return type(f"{kind.__name__}Once", (kind,), {"name": f"{kind.name}{ONCE}"})


def regimes(kind: type[Method]) -> dict[str, Callable[[Settings], Method]]:
    """Returns the makers of a learning method by name, of the regimes that it does not lack.

    As it is called, it is fitted in-domain; with "-once", train-once.
    """
    makers: dict[str, Callable[[Settings], Method]] = {}
    if "" not in kind.lacks:
        makers[kind.name] = lambda settings: InDomain(settings, kind)
    if ONCE not in kind.lacks:
        makers[kind.name + ONCE] = once(kind)
    return makers
