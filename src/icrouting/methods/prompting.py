"""Prompting alone: zero-shot, and few-shot with demonstrations of the same task (section 6)."""

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.methods.base import Settings
from icrouting.prompts import Prompt, balanced_demos, few_shot
from icrouting.tasks import Example, Task


class ZeroShot:
    """The untouched model on the bare prompt."""

    name = "zero-shot"

    def __init__(self, settings: Settings):
        pass

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        rng: np.random.Generator,
    ) -> None:
        """Learns nothing."""

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the bare prompt."""
        return Prompt("", task.prompt(example))

    def applied(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Leaves the model alone."""
        return nullcontext()


class FewShot:
    """Balanced demonstrations of the task in front of every prompt, the same ones for a whole seed.

    Differs: on unseen tasks the paper takes 3 demonstrations of each source task (section 6); these are the
    task's own, which is the harder rival.
    """

    name = "few-shot"

    def __init__(self, settings: Settings):
        self._per_class = settings.demos_per_class
        self._entropy = 0
        self._demos: dict[str, list[tuple[Task, Example]]] = {}

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        rng: np.random.Generator,
    ) -> None:
        """Draws what the demonstrations are drawn by."""
        self._entropy, self._demos = int(rng.integers(2**32)), {}

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the prompt behind the task's demonstrations."""
        if task.name not in self._demos:
            # Each task has a draw of its own, so that a resumed run finds the same in any order.
            rng = np.random.default_rng([self._entropy, zlib.crc32(task.name.encode())])
            self._demos[task.name] = [(task, demo) for demo in balanced_demos(task, self._per_class, rng)]
        return few_shot(task, example, self._demos[task.name])

    def applied(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Leaves the model alone."""
        return nullcontext()
