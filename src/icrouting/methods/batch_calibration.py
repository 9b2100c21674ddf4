"""Batch calibration as methods: what a model leans to, from a task's prompts without labels."""

import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import tokenize
from icrouting.decoder.scoring import score
from icrouting.methods.base import Method, Scores
from icrouting.methods.icr import Icr
from icrouting.methods.regimes import ONCE
from icrouting.routing.gate import FEWEST_ROWS
from icrouting.routing.priors import fewest_prompts
from icrouting.routing.shipped import TaskCalibration
from icrouting.tasks.task import Example, Task, TaskSpec

# Prompts that a prior is estimated from, at most: the curve is flat from some hundred on.
N_PROMPTS = 200
_OWN = "a prior is a task's own, and needs no label of it: leave '-once' away"


class BatchCalibration(Method):
    """Zero-shot, less what the model leans to over a batch of prompts (Zhou et al. 2023).

    The batch is N_PROMPTS of the task's training prompts at most, of which no label is read.
    Differs: the paper takes the test batch itself; `icr report --calibrate` does so, of every
    method. And the labels' shares are estimated and given back (`routing.priors`, "guarded"), since
    plain batch calibration takes the options for equally frequent.

    Attributes:
        scores: of the batch, [n_prompts, most_options]; -inf where a row has fewer options.
    """

    name = "batch-calibration"
    learned = ("scores",)
    lacks: Mapping[str, str] = MappingProxyType({ONCE: _OWN})
    scores: Float[Tensor, "n_prompts most_options"]
    _estimate: "Estimate | None" = None

    def learn(self, rng: np.random.Generator) -> None:
        """Keeps the scores of the task's prompts."""
        (task,) = self.sources
        rows = drawn_rows(task, rng)
        prompts = [self.prompt(task, row) for row in rows]
        options = [task.options(row) for row in rows]
        self.scores = score(self.decoder, prompts, options, label_scoring=task.spec.label_scoring)
        # Now, rather than when the first test row is asked.
        _ = self._prior()

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns log-probabilities over the options, less their prior."""
        calibration = self._prior()
        options = [task.options(example) for example in examples]
        check_options(calibration, options)
        adjusted, _ = calibration.adjusted(scores, options, "")
        return adjusted

    def _prior(self) -> TaskCalibration:
        self._estimate = estimated(self._estimate, self.sources[0].spec, self.scores)
        return self._estimate.calibration

    def n_cached(self, task: Task) -> int:
        """Returns the numbers of one prior: one for each option."""
        return self.scores.shape[1]


class IcrSafe(Icr):
    """ICR on prompts that its gate knows, and batch calibration on all others (not in the paper).

    The gate is the router's own, as it ships. Of N_PROMPTS of the task's training prompts at most,
    those that the gate leaves alone estimate what the model leans to, as `batch-calibration` does;
    where they are too few for it, what is left alone stays as it is. No label of the task is read.

    Attributes:
        scores: of the training prompts that were left alone, [n_prompts, most_options].
    """

    name = "icr-safe"
    draws = True
    reads_sources = True
    learned = ("scores",)
    scores: Float[Tensor, "n_prompts most_options"]
    _estimate: "Estimate | None" = None
    # What the gate said of the prompts that were asked last.
    _is_routed: dict[tuple[int, ...], bool]

    def learn(self, rng: np.random.Generator) -> None:
        """Keeps the scores of the task's prompts that the gate leaves alone."""
        if self._router.gate is None:
            raise ValueError(
                f"{self.name} needs a router with a gate: fit one on {FEWEST_ROWS} training "
                "queries of each task or more"
            )
        (task,) = self.sources
        rows = drawn_rows(task, rng)
        prompts = [self.prompt(task, row) for row in rows]
        options = [task.options(row) for row in rows]
        with self.applied(task):
            scores = score(self.decoder, prompts, options, label_scoring=task.spec.label_scoring)
        is_left_alone = ~self._are_routed([prompt.text for prompt in prompts])
        self.scores = scores[is_left_alone]

    @contextmanager
    def applied(self, task: Task) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Routes the model by each prompt that the gate knows, and notes which these are."""
        reader = self._reader(self._router.gate)
        with reader.decisions.noted() as self._is_routed, self._router.attached_by(reader):
            yield

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the scores, without the prior where prompts were left alone."""
        if not has_prior(self.scores):
            return scores
        self._estimate = estimated(self._estimate, self.sources[0].spec, self.scores)
        calibration = self._estimate.calibration
        options = [task.options(example) for example in examples]
        check_options(calibration, options)
        adjusted, _ = calibration.adjusted(scores, options, "")
        prompts = [self.prompt(task, example).text for example in examples]
        are_routed = self._are_routed(prompts)
        # A service asks without end, and each prompt is noted anew when it is asked again.
        self._is_routed.clear()
        return torch.where(are_routed[:, None], scores, adjusted)

    def depends_on(self) -> str:
        """Returns the router's digest."""
        return self._router.digest()

    def _are_routed(self, prompts: Sequence[str]) -> Tensor:
        """Returns which of the prompts that were just asked the gate has let through."""
        token_lists = tokenize(self.decoder.tokenizer, prompts)
        return torch.tensor([self._is_routed[tuple(tokens)] for tokens in token_lists])


def drawn_rows(task: Task, rng: np.random.Generator) -> list[Example]:
    """Returns the training rows whose prompts a prior is estimated from."""
    places = rng.permutation(len(task.train))[:N_PROMPTS]
    return [task.train[place] for place in places]


def has_prior(scores: Float[Tensor, "n_prompts most_options"]) -> bool:
    """Returns whether some number of options has prompts enough to estimate their prior."""
    counts = scores.isfinite().sum(1).bincount().tolist()
    return any(n >= fewest_prompts(n_options) for n_options, n in enumerate(counts) if n)


def prior_of(spec: TaskSpec, scores: Float[Tensor, "n_prompts most_options"]) -> TaskCalibration:
    """Returns the priors of a task; ValueError where its prompts are too few."""
    n_options = scores.isfinite().sum(1).tolist()
    options = [spec.options or tuple(string.ascii_uppercase[:n]) for n in n_options]
    return TaskCalibration.of(spec, scores, options)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A task's priors, with the scores that they are estimated from.

    Attributes:
        scores: [n_prompts, most_options].
        calibration: the priors.
    """

    scores: Tensor
    calibration: TaskCalibration


def estimated(
    last: Estimate | None, spec: TaskSpec, scores: Float[Tensor, "n_prompts most_options"]
) -> Estimate:
    """Returns the last estimate as long as it is of these scores, else a new one.

    A new one takes longer than an answer does.
    """
    if last is not None and last.scores is scores:
        return last
    return Estimate(scores, prior_of(spec, scores))


def check_options(calibration: TaskCalibration, options: Sequence[tuple[str, ...]]) -> None:
    """Checks that priors are of a task's options.

    Rows that bring as many choices as no batch had keep their scores. ValueError where a task has
    the same options for all rows, and others.
    """
    expected = calibration.spec.options
    others = [row_options for row_options in options if expected and row_options != expected]
    if others:
        raise ValueError(
            f"the prior is of the options {list(expected)}, not of {list(others[0])}: estimate "
            "one for these"
        )
