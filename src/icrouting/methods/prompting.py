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
    reads_sources = False


class FewShot(Method):
    """Balanced demonstrations of the task in front of every prompt, the same ones for a whole seed.

    Differs: on unseen tasks too the demonstrations are the task's own, a harder rival than the
    paper's (section 6), which is `MultiTaskFewShot`.
    """

    name = "few-shot"
    reads_sources = False

    def learn(self, rng: np.random.Generator) -> None:
        """Forgets the demonstrations of the seed before."""
        # By name, beside the task that they are of: tasks may share a name.
        self._demos: dict[str, tuple[Task, list[tuple[Task, Example]]]] = {}

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the prompt behind the demonstrations."""
        # Once a task, so that all its prompts share a context, which is then computed once.
        kept = self._demos.get(task.name)
        if kept is None or not kept[0].teaches_like(task):
            kept = (task, self.demonstrations(task))
            self._demos[task.name] = kept
        return few_shot(task, example, kept[1])

    def demonstrations(self, task: Task) -> list[tuple[Task, Example]]:
        """Returns the demonstrations for a task.

        They are drawn apart from any other task's, so the order of tasks makes no difference.
        """
        rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
        demos = balanced_demos(task, self.settings.demos_per_class, rng)
        return [(task, demo) for demo in demos]


class MultiTaskFewShot(FewShot):
    """Demonstrations of every source task, three each, in front of every prompt.

    No label of the task itself is seen: the paper's few-shot rival on unseen tasks (section 6). On
    a source task it is the same prompt.
    """

    name = "multi-task-few-shot"
    reads_sources = True

    def demonstrations(self, task: Task) -> list[tuple[Task, Example]]:
        """Returns shuffled demonstrations of all source tasks, the same for all tasks of a seed."""
        if not self.sources:
            raise ValueError(f"{self.name} shows rows of source tasks: give at least one")
        # Without the task's name in it: the prompt is one for all tasks.
        rng = np.random.default_rng(self.entropy)
        demos = []
        for source in self.sources:
            places = rng.permutation(len(source.train))[: self.settings.demos_per_source]
            for place in places:
                demos.append((source, source.train[place]))
        # Else the tasks would stand in blocks, and the last of them next to the question.
        return [demos[place] for place in rng.permutation(len(demos))]
