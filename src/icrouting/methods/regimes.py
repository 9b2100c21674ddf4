"""The two regimes of a method that learns: fitted anew on each task, or once on the pooled source tasks."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from icrouting.methods.base import Context, Method, Scores, Settings
from icrouting.prompts import Prompt
from icrouting.tasks import Example, Task


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

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns what the task's own method reads."""
        return self._of(task).prompt(task, example)

    def applied(self, task: Task) -> Context:
        """Applies the task's own method."""
        return self._of(task).applied(task)

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Adjusts as the task's own method does."""
        return self._of(task).adjusted(task, examples, scores)

    def n_cached(self, task: Task) -> int:
        """Returns the numbers that the task's own method keeps."""
        return self._of(task).n_cached(task)

    def _of(self, task: Task) -> Method:
        key = self.entropy, task.name
        if key not in self._fitted:
            method, folder = self._kind(self.settings), self.settings.folder
            rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
            file = folder / f"{self.name}-seed{self.seed}-{task.name}.safetensors" if folder else None
            method.fit(self.model, self.tokenizer, [task], rng, file)
            self._fitted[key] = method
        return self._fitted[key]
