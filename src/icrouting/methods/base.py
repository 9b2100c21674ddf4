"""What a method is: a few verbs with plain defaults, and no privilege for any."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import check_alone, hooked
from icrouting.decoder.hooks import counted_rows
from icrouting.decoder.scoring import score
from icrouting.methods.settings import Settings
from icrouting.runtime.checks import check_same
from icrouting.runtime.storage import load_tensors, save_tensors, unshared
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Example, Task

Scores = Float[Tensor, "n_examples n_options"]
Context = AbstractContextManager[object]
_NOTES = {"tried": "[]", "cost": "{}"}


class Method:
    """A way to make a frozen model solve a task; as it stands here, the untouched model on the bare prompt.

    A subclass says only what it does otherwise. `fit` is called once per seed, before anything else.

    Attributes:
        name: what tables call it.
        draws: whether its predictions depend on the seed. One that draws nothing answers every seed alike, and
            the evaluator copies the answers instead of computing them again.
        learned: names of the attributes, all tensors, in which `learn` leaves what it learned.
        cached: those of them that inference keeps beside the model.
        lacks: why it has no in-domain regime, under "", or no train-once regime, under "-once".
        n_labelled: labelled rows that the fit in force looked at; `learn` says.
        n_trained: parameters that it trained; `learn` says.
        tried: the settings it tried, each with its accuracy on validation rows under "accuracy".
        cost: what the fit took: "labelled", "trained", rows run "forwards" and "backwards", "seconds".
        seed: of the fit in force.
        decoder: the frozen model and its tokenizer; like the three below, from `fit` on.
        sources: the tasks to learn from.
        entropy: drawn from the seed; seeds further draws.
        file: where the fit is kept for a resumed run; None keeps none.
    """

    name: str
    draws: bool = True
    learned: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    lacks: Mapping[str, str] = {}
    n_labelled: int = 0
    n_trained: int = 0
    seed: int | None = None

    def __init__(self, settings: Settings):
        self.settings = settings

    @classmethod
    def cuts(cls, settings: Settings) -> list[str]:
        """Returns what the settings make it take less of than was published, in sentences for a report."""
        return []

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Task],
        rng: np.random.Generator,
        file: Path | None = None,
    ) -> None:
        """Learns, or takes up what an earlier run learned and kept in `file`."""
        self.fit_on(Decoder.of(model, tokenizer), sources, rng, file)

    def fit_on(
        self,
        decoder: Decoder,
        sources: Sequence[Task],
        rng: np.random.Generator,
        file: Path | None = None,
    ) -> None:
        """Does what `fit` does, for whoever holds a decoder."""
        check_alone(decoder.model, self.name)
        self.decoder = decoder
        self.sources = sources
        self.file = file
        self.entropy = int(rng.integers(2**32))
        self.tried: list[dict[str, Any]] = []
        self.cost: dict[str, float] = {}
        if file is not None and file.exists():
            tensors, notes = load_tensors(file)
            self.restore(tensors)
            for name, now in self._made_with().items():  # an earlier version kept less
                check_same(str(file), notes.get(name, now), now)
            self.tried, self.cost = (
                json.loads(notes.get(name, empty)) for name, empty in _NOTES.items()
            )
            return
        # A model met for the first time is asked what it is, which is no part of the cost.
        _ = decoder.family
        if self.learned and not self.sources:
            raise ValueError(
                f"{self.name} learns from training rows: give at least one source task"
            )
        started = time.monotonic()
        with counted_rows(decoder.model) as rows:
            self.learn(rng)
        if wrong := [name for name in self.learned if not isinstance(vars(self).get(name), Tensor)]:
            raise TypeError(
                f"{self.name}: what `learned` names must be tensors after `learn`, not so {wrong}"
            )
        self.cost = {"labelled": self.n_labelled, "trained": self.n_trained, **rows}
        self.cost["seconds"] = time.monotonic() - started
        if file is not None and (learned := self.tensors()):
            file.parent.mkdir(parents=True, exist_ok=True)
            notes = {name: json.dumps(vars(self)[name]) for name in _NOTES}
            save_tensors(
                file, unshared(learned), {"method": self.name, **self._made_with(), **notes}
            )

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model, from `fit` on."""
        return self.decoder.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, from `fit` on."""
        return self.decoder.tokenizer

    def _made_with(self) -> dict[str, str]:
        """What a fit that is kept is held against; the router, which a run may take more of, is in `depends_on`."""
        settings = {
            name: f"{name}={value!r}"
            for name, value in vars(self.settings).items()
            if name != "router"
        }
        return {"depends_on": self.depends_on(), "model": self.decoder.fingerprint, **settings}

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
        return sum(vars(self)[name].numel() for name in self.cached)

    def depends_on(self) -> str:
        """Returns what the answers depend on beside the model, the settings and the tensors; empty for nothing."""
        return ""

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `learn` learned, so that a resumed run need not learn it again."""
        return {name: vars(self)[name] for name in self.learned}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        vars(self).update(tensors)

    def choose(
        self, settings: Sequence[Mapping[str, Any]], build: Callable[..., dict[str, Tensor]]
    ) -> None:
        """Takes up what `build` makes of the setting that is right on most validation rows, the first of equals.

        Every method has the same budget of settings: those beyond `Settings.tries` are not tried. Where there is
        only one to try, nothing is scored.
        """
        best, kept, allowed = -1.0, {}, settings[: self.settings.tries]
        if len(allowed) > 1 and not all(task.validation for task in self.sources):
            raise ValueError(
                f"{self.name} chooses on validation rows: give 5 training rows or more"
            )
        for setting in allowed:
            built = build(**setting)
            self.restore(built)
            accuracy = self.validated() if len(allowed) > 1 else 0.0
            self.tried += [{**setting, "accuracy": accuracy}] if len(allowed) > 1 else []
            if accuracy > best:
                best, kept = accuracy, built
        self.restore(kept)

    @property
    def n_validation(self) -> int:
        """The validation rows that were read to choose by: none where there was only one setting."""
        return sum(len(task.validation) for task in self.sources) if self.tried else 0

    def validated(self) -> float:
        """Returns the accuracy of what is in force on the validation rows of the sources, pooled."""
        hits = []
        for task in (task for task in self.sources if task.validation):
            rows = task.validation
            options = [task.options(row) for row in rows]
            with self.applied(task):
                scores = score(self.decoder, [self.prompt(task, row) for row in rows], options)
            predicted = self.adjusted(task, rows, scores).argmax(1).tolist()
            hits += [guess == row.label for guess, row in zip(predicted, rows, strict=True)]
        return float(np.mean(hits))

    @contextmanager
    def attached(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> Iterator["Method"]:
        """Inside, the model (ValueError for another) is under the influence of what was learned, for one task.

        ValueError while another method is attached: how two would add up, none of them says.
        """
        check_alone(model, self.name)
        method = self.on(task)
        decoder = Decoder.of(model, tokenizer)
        fitted_on = vars(method).get("decoder", decoder)
        if decoder.model is not fitted_on.model:
            fitted_name = fitted_on.model.config.name_or_path
            decoder.check_fitted_on(method.name, fitted_name, fitted_on.fingerprint)
        method.decoder = decoder
        with method.applied(task), hooked(decoder.model, method.name):
            yield method

    @property
    def edits_model(self) -> bool:
        """Whether the model computes anything else under this method; if not, equal prompts are run once."""
        return type(self).applied is not Method.applied
