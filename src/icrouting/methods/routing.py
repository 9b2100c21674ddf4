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
        if settings.router is None:
            raise ValueError("the method 'icr' needs --router, a folder or hub id: fit one with `icr fit`")
        self._router = InContextRouter.from_pretrained(settings.router)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        rng: np.random.Generator,
    ) -> None:
        """Learns nothing more: its router is fitted."""
        self._tokenizer = tokenizer

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the bare prompt."""
        return Prompt("", task.prompt(example))

    def applied(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Routes the model by each prompt."""
        assert self._tokenizer is not None, "fit comes before applied"
        return self._router.attached(model, self._tokenizer)
