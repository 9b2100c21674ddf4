"""What a method is: a few verbs with plain defaults, and no privilege for any."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.config import Settings
from icrouting.prompts import Prompt
from icrouting.storage import load_tensors, save_tensors
from icrouting.tasks import Example, Task

Scores = Float[Tensor, "n_examples n_options"]
Context = AbstractContextManager[object]


class Method:
    """A way to make a frozen model solve a task; as it stands here, the untouched model on the bare prompt.

    A subclass says only what it does otherwise. `fit` is called once per seed, before anything else.

    Attributes:
        name: what tables call it.
        draws: whether its predictions depend on the seed. One that draws nothing answers every seed alike, and
            the evaluator copies the answers instead of computing them again.
        learned: names of the attributes, all tensors, in which `learn` leaves what it learned.
        seed: of the fit in force.
        model: the frozen decoder; like the four below, from `fit` on.
        tokenizer: its tokenizer.
        sources: the tasks to learn from.
        entropy: drawn from the seed; seeds further draws.
        file: where the fit is kept for a resumed run; None keeps none.
    """

    name: str
    draws: bool = True
    learned: tuple[str, ...] = ()
    seed: int | None = None

    def __init__(self, settings: Settings):
        self.settings = settings

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Task],
        rng: np.random.Generator,
        file: Path | None = None,
    ) -> None:
        """Learns, or takes up what an earlier run learned and kept in `file`."""
        self.model, self.tokenizer, self.sources, self.file = model, tokenizer, sources, file
        self.entropy = int(rng.integers(2**32))
        if file is not None and file.exists():
            self.restore(load_tensors(file)[0])
            return
        self.learn(rng)
        if file is not None and (learned := self.tensors()):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, learned)

    def learn(self, rng: np.random.Generator) -> None:
        """Learns from the training rows of `self.sources`, and chooses on their validation rows."""

    def on(self, task: Task) -> "Method":
        """Returns what answers a task: this very method, or one that was fitted on the task."""
        return self

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns what the model reads for a test example."""
        return Prompt("", task.prompt(example))

    def applied(self, task: Task) -> Context:
        """Inside, the model is under the method's influence, for prompts of one task."""
        return nullcontext()

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the option scores that count, given the model's (-inf where an example has fewer options)."""
        return scores

    def n_cached(self, task: Task) -> int:
        """Returns the numbers kept beside the model for a task's inference (paper, table 11)."""
        return 0

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `learn` learned, so that a resumed run need not learn it again."""
        return {name: vars(self)[name] for name in self.learned}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        vars(self).update(tensors)

    @property
    def edits_model(self) -> bool:
        """Whether the model computes anything else under this method; if not, equal prompts are run once."""
        return type(self).applied is not Method.applied
