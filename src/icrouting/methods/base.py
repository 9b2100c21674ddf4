"""What a method is: three verbs, and no privilege for any."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.prompts import Prompt
from icrouting.tasks import Example, Task


@dataclass(frozen=True)
class Settings:
    """What a run tells its methods.

    Attributes:
        demos_per_class: demonstrations per class, for methods that use some.
        router: folder or hub id of a fitted router, for `icr`.
    """

    demos_per_class: int = 5
    router: str | None = None


@runtime_checkable
class Method(Protocol):
    """A way to make a frozen model solve a task."""

    name: str

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        rng: np.random.Generator,
    ) -> None:
        """Learns from the source tasks' training rows whatever the method learns; once per seed."""
        ...

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns what the model reads for a test example."""
        ...

    def applied(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Inside, the model is under the method's influence, for one batch of prompts."""
        ...
