"""Prompting alone: the bare prompt, or one behind demonstrations (section 6)."""

import zlib

import numpy as np

from icrouting.methods.base import Method
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot
from icrouting.tasks.task import Example, Task


class ZeroShot(Method):
    """The untouched model on the bare prompt."""

    name = "zero-shot"
    draws = False


class FewShot(Method):
    """Balanced demonstrations of the task in front of every prompt, the same ones for a whole seed.

    Differs: on unseen tasks too the demonstrations are the task's own, a harder rival than the paper's (section 6),
    which is `MultiTaskFewShot`.
    """

    name = "few-shot"

    def learn(self, rng: np.random.Generator) -> None:
        """Forgets the demonstrations of the seed before."""
        self._demos: dict[str, list[tuple[Task, Example]]] = {}

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the prompt behind the demonstrations."""
        if task.name not in self._demos:
            self._demos[task.name] = self.demonstrations(task)
        return few_shot(task, example, self._demos[task.name])

    def demonstrations(self, task: Task) -> list[tuple[Task, Example]]:
        """Returns the demonstrations for a task, drawn apart from any other's, so their order is all the same."""
        rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
        return [(task, demo) for demo in balanced_demos(task, self.settings.demos_per_class, rng)]


class MultiTaskFewShot(FewShot):
    """Demonstrations of every source task, three each, in front of every prompt: no labels of the task itself.

    The paper's few-shot rival on unseen tasks (section 6); on a source task it is the same prompt.
    """

    name = "multi-task-few-shot"

    def demonstrations(self, task: Task) -> list[tuple[Task, Example]]:
        """Returns demonstrations of all source tasks, shuffled; the same for every task of a seed."""
        if not self.sources:
            raise ValueError(f"{self.name} shows rows of source tasks: give at least one")
        rng, n = np.random.default_rng(self.entropy), self.settings.demos_per_source
        demos = [
            (source, source.train[i])
            for source in self.sources
            for i in rng.permutation(len(source.train))[:n]
        ]
        return [demos[i] for i in rng.permutation(len(demos))]
