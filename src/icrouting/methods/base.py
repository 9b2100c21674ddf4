"""What a method is: a few verbs with plain defaults, and no privilege for any; the two regimes of one that learns."""

import zlib
from collections.abc import Callable, Sequence
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


def once(kind: type[Method]) -> type[Method]:
    """Returns the kind of a method that is fitted on the pooled source tasks and used unchanged on any task."""
    return type(f"{kind.__name__}Once", (kind,), {"name": f"{kind.name}-once"})


def in_domain(kind: type[Method]) -> Callable[[Settings], Method]:
    """Returns the maker of a method that is fitted on every task that it is tested on, unseen ones too."""
    return lambda settings: InDomain(settings, kind)
