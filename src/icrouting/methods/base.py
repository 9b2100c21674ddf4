"""What a method is: a few verbs with plain defaults, and no privilege for any."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.config import DEFAULT_ENCODER
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import Hold, check_alone, hooked
from icrouting.decoder.hooks import counted_rows
from icrouting.decoder.scoring import have_finite_scores, score
from icrouting.methods.bare import score_texts
from icrouting.methods.fits import Fit, load_fit, save_fit
from icrouting.methods.settings import Settings
from icrouting.routing.predictions import ANSWERED, Asked, Prediction, predicted
from icrouting.runtime.checks import check_same
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.chat import Messages
from icrouting.tasks.prompts import Prompt, zero_shot
from icrouting.tasks.streams import rows_of
from icrouting.tasks.task import Example, Task, TaskSpec, rows_digest

Scores = Float[Tensor, "n_examples n_options"]
Context = AbstractContextManager[object]


class Method:
    """A way to make a frozen model solve a task.

    As it stands here, it is the untouched model on the bare prompt; a subclass says only what it
    does otherwise. `fit` is called once per seed, before anything else. What a fit learned is a
    value of its own, `Fit`; a method takes one up by `take`, and by nothing else.

    Attributes:
        name: what tables call it.
        draws: whether its predictions depend on the seed. One that draws nothing answers every
            seed alike, and the evaluator copies the answers instead of computing them again.
        learned: names of the attributes, all tensors, in which `learn` leaves what it learned.
        cached: those of them that inference keeps beside the model.
        reads_sources: whether it needs the rows of the source tasks, for a fit or for prompts.
        lacks: why it has no in-domain regime, under "", or no train-once regime, under "-once".
        follows_checkpointing: whether a layer that runs again for its gradients does under the
            method what it did the first time.
        reads_fields: whether its scores depend on more of a row than its prompt.
        n_labelled: labelled rows that the fit in force looked at; `learn` says.
        n_trained: parameters that it trained; `learn` says.
        tried: the settings that the fit in force tried, see `Fit`; `learn` may add to them.
        cost: what the fit in force took, see `Fit`.
        decoder: the frozen model and its tokenizer; like the three below, from `fit` on.
        sources: the tasks to learn from.
        entropy: drawn from the seed; seeds further draws.
        file: where the fit is kept for a resumed run; None keeps none.
    """

    # What a subclass says of itself.
    name: str
    draws: bool = True
    learned: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    reads_sources: bool = True
    lacks: Mapping[str, str] = {}
    follows_checkpointing: bool = False
    reads_fields: bool = False
    _attached: tuple[Task, Hold] | None = None
    # What the fit in force leaves.
    n_labelled: int = 0
    n_trained: int = 0
    decoder: Decoder
    sources: Sequence[Task]
    tried: list[dict[str, Any]]
    cost: dict[str, int | float]

    def __init__(self, settings: Settings):
        # By name, as it is kept with what was learned.
        self.settings = replace(settings, encoder=settings.encoder or DEFAULT_ENCODER)

    def __repr__(self) -> str:
        decoder = vars(self).get("decoder")
        where = "not fitted"
        if decoder is not None:
            where = f"on {decoder.model.config.name_or_path!r}"
        return f"{type(self).__name__}({self.name!r}, {where})"

    @classmethod
    def cuts(cls, settings: Settings) -> list[str]:
        """Returns sentences on what the settings make it take less of than was published."""
        return []

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Task],
        rng: np.random.Generator,
        file: Path | None = None,
    ) -> None:
        """Learns, or takes up what an earlier run learned and kept in `file`.

        Args:
            model: the frozen model.
            tokenizer: its tokenizer.
            sources: the tasks to learn from.
            rng: makes every draw of the fit.
            file: keeps the fit for a resumed run; None keeps nothing.

        Raises:
            ValueError: the method cannot learn from these tasks or on this model, another method
                is attached to it, or `file` holds a fit of another model or of other settings.
        """
        self.fit_on(Decoder.of(model, tokenizer), sources, rng, file)

    @usual_defaults()
    def fit_on(
        self,
        decoder: Decoder,
        sources: Sequence[Task],
        rng: np.random.Generator,
        file: Path | None = None,
    ) -> None:
        """Does what `fit` does, for whoever holds a decoder."""
        check_alone(decoder.model, self.name)
        sources = [task.bound_to(decoder.tokenizer) for task in sources]
        self.file = file
        # Drawn before the file is looked for, so that a resumed run's draws are the same.
        self.entropy = int(rng.integers(2**32))
        if file is not None and file.exists():
            fit, made_by = load_fit(file)
            self.take(fit, decoder, sources)
            for name, asked_value in self._made_by().items():
                # An earlier version kept less; what it did not keep is not held against it.
                kept_value = made_by.get(name, asked_value)
                check_same(str(file), kept_value, asked_value)
            return
        # `learn` leaves what it learned in its place.
        fit = self._learn_fit(decoder, sources, rng)
        self.tried = fit.tried
        self.cost = fit.cost
        # What learned nothing, or is fitted on each task, has nothing of its own to keep.
        if file is not None and fit.tensors:
            save_fit(file, fit, {"method": self.name, **self._made_by()})

    def take(self, fit: Fit, decoder: Decoder, sources: Sequence[Task]) -> None:
        """Puts a kept fit in force that was learned on this model, from these tasks."""
        self.decoder = decoder
        self.sources = sources
        self.restore(fit.tensors)
        self.tried = fit.tried
        self.cost = fit.cost

    def in_force(self) -> Fit:
        """Returns the fit in force, so that it can be kept."""
        return Fit(self.tensors(), self.tried, self.cost)

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model, from `fit` on."""
        return self.decoder.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, from `fit` on."""
        return self.decoder.tokenizer

    def _learn_fit(
        self, decoder: Decoder, sources: Sequence[Task], rng: np.random.Generator
    ) -> Fit:
        """Returns what `learn` learns, with its cost."""
        # What `learn` reads, and what `choose` adds to.
        self.decoder = decoder
        self.sources = sources
        self.tried = []
        self.cost = {}
        # A model met for the first time is asked what it is, which is no part of the cost.
        _ = decoder.family
        if self.learned and not sources:
            raise ValueError(
                f"{self.name} learns from training rows: give at least one source task"
            )
        started = time.monotonic()
        with counted_rows(decoder.model) as n_rows:
            self.learn(rng)
        seconds = time.monotonic() - started
        # A slip of the method's author, told here rather than where a file is written.
        no_tensors = []
        for name in self.learned:
            if not isinstance(vars(self).get(name), Tensor):
                no_tensors.append(name)
        if no_tensors:
            raise TypeError(
                f"{self.name}: what `learned` names must be tensors after `learn`, "
                f"not so {no_tensors}"
            )
        _check_numbers(self.name, self.tensors())
        cost = {
            "labelled": self.n_labelled,
            "trained": self.n_trained,
            **n_rows,
            "seconds": seconds,
        }
        return Fit(self.tensors(), self.tried, cost)

    def _made_by(self) -> dict[str, str]:
        """Returns what a kept fit is held against, each as a phrase."""
        phrases = {"depends_on": self.depends_on(), "model": self.decoder.fingerprint}
        # Whatever they are tested on.
        learned = [replace(task, test=()) for task in self.sources]
        phrases["rows"] = f"rows={rows_digest(learned)}"
        for name, value in vars(self.settings).items():
            # A run may take a router later; a method that reads it says so in `depends_on`.
            if name != "router":
                phrases[name] = f"{name}={value!r}"
        return phrases

    def learn(self, rng: np.random.Generator) -> None:
        """Learns from the training rows of `self.sources`, and chooses on their validation rows."""

    def on(self, task: Task) -> "Method":
        """Returns what answers a task: this very method, or one that was fitted on the task."""
        return self

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns what the model reads for a test example."""
        return zero_shot(task, example)

    def applied(self, task: Task) -> Context:
        """Inside, the model is under the method's influence, for prompts of one task."""
        return nullcontext()

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the option scores that count, given the model's.

        They are -inf where an example has fewer options than others.
        """
        return scores

    def n_cached(self, task: Task) -> int:
        """Returns the numbers kept beside the model for a task's inference (paper, table 11)."""
        return sum(vars(self)[name].numel() for name in self.cached)

    def fitted_before(self, sources: Sequence[Task]) -> dict[str, Any]:
        """Returns what a fit took that was there before the run; empty where there is none.

        That is its "method", its number of "fits", and what `cost` has; "seconds" are None.
        """
        return {}

    def depends_on(self) -> str:
        """Returns what else the answers depend on; empty for nothing.

        That is, beside the model, the settings and the tensors.
        """
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
        """Takes up what `build` makes of the setting that is right on most validation rows.

        Of equals it is the first. Every method has the same budget of settings: those beyond
        `Settings.tries` are not tried. Where there is only one to try, nothing is scored.
        """
        allowed = settings[: self.settings.tries]
        is_choice = len(allowed) > 1
        # In a pooled choice, a task without such rows would have no say.
        if is_choice and not all(task.validation for task in self.sources):
            raise ValueError(
                f"{self.name} chooses on validation rows: give 5 training rows or more"
            )
        # Below any accuracy, so that a lone setting, which is not scored, is taken up too.
        best_accuracy = -1.0
        best_tensors: dict[str, Tensor] = {}
        for setting in allowed:
            tensors = build(**setting)
            self.restore(tensors)
            accuracy = 0.0
            if is_choice:
                accuracy = self.validated()
                self.tried.append({**setting, "accuracy": accuracy})
            if accuracy > best_accuracy:
                best_accuracy = accuracy
                best_tensors = tensors
        self.restore(best_tensors)

    @property
    def n_validation(self) -> int:
        """The validation rows that were read to choose by: none where there was one setting."""
        if not self.tried:
            return 0
        return sum(len(task.validation) for task in self.sources)

    def validated(self) -> float:
        """Returns the accuracy of what is in force on the sources' validation rows, pooled."""
        hits = []
        for task in self.sources:
            rows = task.validation
            # Of few rows none are held back.
            if not rows:
                continue
            prompts = [self.prompt(task, row) for row in rows]
            options = [task.options(row) for row in rows]
            with self.applied(task):
                plain_scores = score(
                    self.decoder,
                    prompts,
                    options,
                    label_scoring=task.spec.label_scoring,
                    finite_only=False,
                )
            scores = self.adjusted(task, rows, plain_scores)
            labels = torch.tensor([row.label for row in rows])
            # What is not finite is no answer, so it cannot be right.
            is_answer = have_finite_scores(scores, plain_scores, options)
            hits += ((scores.argmax(1) == labels) & is_answer).tolist()
        return float(np.mean(hits))

    @contextmanager
    def attached(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> Iterator["Method"]:
        """Inside, the model is under the influence of what was learned, for one task.

        Yields the method that is in force. On another object than it was fitted on, which may be
        the same checkpoint loaded anew, that is a copy: this one stays where it was.

        Raises:
            ValueError: another model, or one to which a method is attached: how two would add up,
                none of them says.
        """
        check_alone(model, self.name)
        task = task.bound_to(tokenizer)
        method = self.on(task)._moved_to(Decoder.of(model, tokenizer))
        with hooked(method.decoder.base, method.name, method.applied(task)) as hold:
            hold.check = hold.hooked_modules.check
            hold.follows_checkpointing = method.follows_checkpointing
            method._attached = (task, hold)
            try:
                yield method
            finally:
                method._attached = None

    def score(
        self, prompts: Sequence[str | Messages], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> Scores:
        """Returns the option scores that count after each prompt, inside `attached`.

        Args:
            prompts: zero-shot prompts, ending right before the space and the answer, or
                conversations.
            options: the answers to choose from, for all prompts or a list each.

        Raises:
            ValueError: nothing is attached, or the method reads rows and not prompts alone.
        """
        task, hold = self._in_use()
        kind = type(self)
        if kind.reads_fields or kind.prompt is not Method.prompt:
            raise ValueError(f"{self.name} reads a task's rows, not prompts alone: use `predict`")
        with hold.turn():
            label_scoring = task.spec.label_scoring
            return score_texts(self.decoder, prompts, options, self.adjusted, label_scoring)

    def predict(self, rows: Any, task: Task | TaskSpec | None = None) -> list[Prediction]:
        """Returns a prediction for each row, inside `attached`, without a look at any label.

        A row that does not fit, or is too long for the model, says so in its status.

        Args:
            rows: a list of dicts, a data frame, a `datasets.Dataset` or the path of a file.
            task: how rows become prompts; None is the task that the method is attached for.

        Raises:
            ValueError: these are no rows, or nothing is attached.
        """
        attached_task, hold = self._in_use()
        if isinstance(task, TaskSpec):
            unbound = replace(attached_task, spec=task, rendering=None)
            task = unbound.bound_to(self.tokenizer)
        task = task or attached_task
        with hold.turn():
            return predicted(
                self.decoder,
                task,
                rows_of(rows, task.spec),
                prompt=self.prompt,
                settled=self._settled,
            )

    def _settled(
        self, task: Task, asked: Sequence[Asked], scores: Scores
    ) -> tuple[Scores, list[str]]:
        """Returns the scores that count, and how rows were answered."""
        scores = self.adjusted(task, [row.example for row in asked], scores)
        return scores, [ANSWERED] * len(asked)

    def _in_use(self) -> tuple[Task, Hold]:
        """Returns the task that the method is attached for, and its hold on the model."""
        if self._attached is None:
            raise ValueError(
                f"{self.name} is attached to no model: ask it inside `with method.attached(...)`"
            )
        return self._attached

    def _moved_to(self, decoder: Decoder) -> "Method":
        """Returns this method on a decoder; ValueError if it was fitted on another model."""
        fitted_on: Decoder | None = vars(self).get("decoder")
        if fitted_on is None:
            self.decoder = decoder
            return self
        is_same_model = fitted_on.model is decoder.model
        if is_same_model and fitted_on.tokenizer is decoder.tokenizer:
            # The weights may have been changed in place, and a router is held against what
            # they are: so the new decoder, which has not looked at them yet.
            self.decoder = decoder
            return self
        if not is_same_model:
            fitted_name = fitted_on.model.config.name_or_path
            weights = fitted_on.base_weights
            decoder.check_fitted_on(self.name, fitted_name, fitted_on.fingerprint, weights)
        moved = copy(self)
        moved.decoder = decoder
        return moved

    @property
    def edits_model(self) -> bool:
        """Whether the model computes anything else under this method.

        If not, equal prompts are run once.
        """
        # By the class: whoever edits a model has a context of its own to do so.
        return type(self).applied is not Method.applied


def _check_numbers(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks what a method learned; ValueError where it is not a number."""
    for part, tensor in tensors.items():
        if tensor.isnan().any():
            raise ValueError(f"{name} learned NaN ({part}): load the model in float32 or bfloat16")
