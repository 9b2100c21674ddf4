"""The two regimes of a method that learns: fitted anew on each task, or once on the pooled source tasks."""

import zlib
from collections.abc import Callable

import numpy as np

from icrouting.config import Settings
from icrouting.methods.base import Method
from icrouting.tasks import Task


def once(kind: type[Method]) -> Callable[[Settings], Method]:
    """Returns the maker of a method that is fitted on the pooled source tasks and used unchanged on any task."""

    def make(settings: Settings) -> Method:
        method = kind(settings)
        method.name = f"{kind.name}-once"
        return method

    return make


def in_domain(kind: type[Method]) -> Callable[[Settings], Method]:
    """Returns the maker of a method that is fitted on every task that it is tested on, unseen ones too."""
    return lambda settings: InDomain(settings, kind)


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
            file = self.file.with_stem(f"{self.file.stem}-{task.name}") if self.file else None
            method.fit(self.model, self.tokenizer, [task], rng, file)
            self._fitted[key] = method
        return self._fitted[key]
