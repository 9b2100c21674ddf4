"""In-Context Routing as one method among others."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.icr import InContextRouter
from icrouting.methods.base import Settings
from icrouting.prompts import Prompt
from icrouting.tasks import Example, Task


class Icr:
    """The bare prompt on the routed model."""

    name = "icr"

    def __init__(self, settings: Settings):
        self._router = InContextRouter.from_pretrained(settings.router) if settings.router else None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        rng: np.random.Generator,
    ) -> None:
        """Fits a router on the source tasks, unless the run names a fitted one."""
        self._tokenizer = tokenizer
        if self._router is None:
            self._router = InContextRouter.fit(model, tokenizer, tasks)

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the bare prompt."""
        return Prompt("", task.prompt(example))

    def applied(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Routes the model by each prompt."""
        assert self._router is not None, "fit comes before applied"
        assert self._tokenizer is not None, "fit comes before applied"
        return self._router.attached(model, self._tokenizer)
