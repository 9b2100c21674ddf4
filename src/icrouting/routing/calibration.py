"""Calibration in use: a task's prior, from prompts without labels, taken away from new scores."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import f
from torch import Tensor

from icrouting.routing.priors import Way, fewest_prompts, log_prior, log_probabilities
from icrouting.tasks.task import LabelScoring

DEFAULT_WAY: Way = "guarded"
# Of the chance that prompts of the same task are so unlike: below it, they are called unlike.
UNLIKELY = 1e-4
# Added to a variance, in squared nats: it keeps a constant column from dividing by nothing.
LEAST_VARIANCE = 1e-6
# A stream's prior is estimated anew when its prompts have grown by this share.
RENEWED_AT = 0.01


@runtime_checkable
class Calibrating(Protocol):
    """What `Routed.score` takes as its `calibration`."""

    def check(self, options: Sequence[str], asked_of: str) -> None:
        """Checks that it is for these options, of what gives the scores; ValueError if not."""
        ...

    def adjusted(
        self, scores: Float[Tensor, "n n_options"], options: Sequence[str], asked_of: str
    ) -> Float[Tensor, "n n_options"]:
        """Returns the scores that count.

        Args:
            scores: the model's, of prompts with these options.
            options: the options.
            asked_of: what gave the scores.
        """
        ...


@dataclass(frozen=True, eq=False)
class BatchCalibration:
    """The prior of one list of options, estimated from prompts without labels.

    Attributes:
        options: the options, in their order.
        log_probs: each prompt's log-probabilities over them.
        way: how the prior is estimated (`routing.priors`).
        made_of: what gave the scores: a router with its strength and gate, or a model alone.
    """

    options: tuple[str, ...]
    log_probs: Float[Tensor, "n_prompts n_options"]
    way: Way = DEFAULT_WAY
    made_of: str = ""

    def __post_init__(self):
        if len(self.options) < 2:
            raise ValueError(f"calibration needs two options or more, got {list(self.options)}")
        n_prompts = len(self.log_probs)
        if n_prompts < fewest_prompts(len(self.options)):
            raise ValueError(
                f"calibration by {n_prompts} prompts of {len(self.options)} options says nothing: "
                f"give {fewest_prompts(len(self.options))} or more, better a hundred"
            )
        _check_width(self.log_probs, self.options)
        # Of one such prompt there would be no number left in any answer.
        if self.log_probs.isnan().any():
            raise ValueError(
                "calibration needs scores that are numbers, got NaN or infinity among those of "
                f"{int(self.log_probs.isnan().any(1).sum())} prompts: leave these out"
            )

    @classmethod
    def of(
        cls,
        scores: Float[Tensor, "n_prompts n_options"],
        options: Sequence[str],
        way: Way = DEFAULT_WAY,
        made_of: str = "",
    ) -> "BatchCalibration":
        """Returns the calibration by the scores of some prompts.

        Raises:
            ValueError: there are fewer prompts than options, or fewer than two of either, or a
                score is NaN or infinite; -inf rules an option out.
        """
        return cls(tuple(options), _log_probs(scores), way, made_of)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchCalibration):
            return NotImplemented
        numbers = (self.options, self.way, self.made_of)
        is_same = numbers == (other.options, other.way, other.made_of)
        return is_same and torch.equal(self.log_probs, other.log_probs)

    def __hash__(self) -> int:
        return hash((self.options, self.way, self.made_of))

    def __repr__(self) -> str:
        return (
            f"BatchCalibration({len(self.options)} options, {self.n_prompts} prompts, {self.way!r})"
        )

    @property
    def n_prompts(self) -> int:
        """How many prompts the prior is estimated from."""
        return len(self.log_probs)

    @cached_property
    def log_prior(self) -> Float[Tensor, "n_options"]:
        """What is taken away from each option's log-probability, in nats; its mean is 0."""
        prior = torch.from_numpy(log_prior(self.log_probs.double().numpy(), self.way))
        return (prior - prior.mean()).float()

    def with_scores(self, scores: Float[Tensor, "n n_options"]) -> "BatchCalibration":
        """Returns the calibration by these prompts and further ones."""
        return replace(self, log_probs=torch.cat([self.log_probs, _log_probs(scores)]))

    def adjusted(
        self, scores: Float[Tensor, "n n_options"], options: Sequence[str], asked_of: str = ""
    ) -> Float[Tensor, "n n_options"]:
        """Returns log-probabilities over the options, less their prior.

        Raises:
            ValueError: the statistics are of other options, or of another model or router.
        """
        self.check(options, asked_of)
        _check_width(scores, self.options)
        return scores.log_softmax(-1) - self.log_prior.to(scores)

    def check(self, options: Sequence[str], asked_of: str = "") -> None:
        """Checks that it is of these options, of what gives the scores.

        Raises:
            ValueError: it is of others.
        """
        if tuple(options) != self.options:
            raise ValueError(
                f"the calibration is of the options {list(self.options)}, not of {list(options)}: "
                "estimate one for these"
            )
        if asked_of != self.made_of:
            raise ValueError(
                f"the calibration is of {self.made_of or 'a model alone'}, and this is "
                f"{asked_of or 'a model alone'}: estimate it with what answers"
            )

    def chance_of(self, scores: Float[Tensor, "n n_options"]) -> float:
        """Returns how likely prompts like those of the estimate are as unlike them as these are.

        It is the p-value of Hotelling's test of two means; prompts of another task have one of 0,
        as far as their scores tell. Of fewer prompts than options, in all, nothing can be told:
        it is 1.

        Raises:
            ValueError: a score is not finite.
        """
        new = _log_probs(scores).double()
        known = self.log_probs.double()
        if not (new.isfinite().all() and known.isfinite().all()):
            raise ValueError("prompts are compared by finite scores: leave out those with others")
        n_prompts = len(new) + len(known)
        n_dims = len(self.options) - 1
        n_free = n_prompts - n_dims - 1
        if not len(new) or n_free < 1:
            return 1.0
        # Each row's probabilities add up to 1: the last option follows from the others.
        new = (new - new[:, -1:])[:, :-1]
        known = (known - known[:, -1:])[:, :-1]
        gap = new.mean(0) - known.mean(0)
        both = torch.cat([new - new.mean(0), known - known.mean(0)])
        covariance = both.T @ both / max(1, n_prompts - 2)
        covariance += LEAST_VARIANCE * torch.eye(len(gap), dtype=torch.float64)
        scale = len(new) * len(known) / (len(new) + len(known))
        distance = scale * gap @ torch.linalg.solve(covariance, gap)
        # Its limit for many prompts, chi squared, would find most prompts of 77 options unlike.
        return float(
            f.sf(float(distance) * n_free / (max(1, n_prompts - 2) * n_dims), n_dims, n_free)
        )


class CalibrationStream:
    """A calibration that goes along: each batch of scores joins the estimate, then gets it.

    Until there are as many prompts as options, scores come back as log-probabilities, as they are.
    After n prompts `calibration` is that of a batch of those n. The one that is taken away is
    estimated anew when one prompt in a hundred is new, since "guarded" takes tens of milliseconds.

    Attributes:
        way: how the prior is estimated.
    """

    def __init__(self, way: Way = DEFAULT_WAY):
        self.way: Way = way
        self._applied: BatchCalibration | None = None
        # Log-probabilities that are in no calibration: to join each of a million prompts to all
        # before it would take the time of their square.
        self._waiting: list[Tensor] = []
        self._joined: BatchCalibration | None = None
        self._options: tuple[str, ...] | None = None
        self._asked_of: str | None = None

    @property
    def n_prompts(self) -> int:
        """How many prompts it has seen."""
        n_joined = 0 if self._joined is None else self._joined.n_prompts
        return n_joined + sum(map(len, self._waiting))

    @property
    def calibration(self) -> BatchCalibration | None:
        """The estimate so far; None before there are prompts enough."""
        if self._options is None or self.n_prompts < fewest_prompts(len(self._options)):
            return None
        if self._waiting:
            pieces = list(self._waiting)
            if self._joined is not None:
                pieces.insert(0, self._joined.log_probs)
            log_probs = torch.cat(pieces)
            asked_of = self._asked_of or ""
            self._joined = BatchCalibration(self._options, log_probs, self.way, asked_of)
            self._waiting.clear()
        return self._joined

    def __repr__(self) -> str:
        return f"CalibrationStream({self.n_prompts} prompts, {self.way!r})"

    def adjusted(
        self, scores: Float[Tensor, "n n_options"], options: Sequence[str], asked_of: str = ""
    ) -> Float[Tensor, "n n_options"]:
        """Returns log-probabilities over the options, less their prior over all prompts so far.

        Raises:
            ValueError: the options, or what gave the scores, are others than before, or a score
                is NaN or infinite; the stream is then as it was.
        """
        self.check(options, asked_of)
        _check_width(scores, options)
        log_probs = _log_probs(scores)
        # What cannot be counted joins nothing, so that the stream can go on without it.
        if log_probs.isnan().any():
            raise ValueError(
                "a stream needs scores that are numbers, got NaN or infinity: leave these prompts "
                "out; the estimate is as it was"
            )
        self._options = tuple(options)
        self._asked_of = asked_of
        self._waiting.append(log_probs)
        n_applied = 0 if self._applied is None else self._applied.n_prompts
        if self._applied is None or self.n_prompts >= (1 + RENEWED_AT) * n_applied:
            self._applied = self.calibration
        if self._applied is None:
            return scores.log_softmax(-1)
        return self._applied.adjusted(scores, options, asked_of)

    def check(self, options: Sequence[str], asked_of: str = "") -> None:
        """Checks that options, and what gives the scores, are those of before.

        Raises:
            ValueError: they are others, or fewer than two.
        """
        if len(options) < 2:
            raise ValueError(f"calibration needs two options or more, got {list(options)}")
        if self._options is None:
            return
        if (tuple(options), asked_of) != (self._options, self._asked_of):
            raise ValueError(
                f"this stream is of the options {list(self._options)} of "
                f"{self._asked_of or 'a model alone'}, and these are {list(options)} of "
                f"{asked_of or 'a model alone'}: begin another for them"
            )


def scored_by(made_of: str, label_scoring: LabelScoring) -> str:
    """Returns what gave scores, with the way in which options were scored."""
    # The usual way has no words, so that priors that an earlier version kept are as they were.
    if label_scoring == "first":
        return made_of
    return f"{made_of or 'a model alone'}, by the {label_scoring} over an option's tokens"


def _check_width(scores: Tensor, options: Sequence[str]) -> None:
    """ValueError unless there is a score for each option."""
    if scores.ndim != 2 or scores.shape[1] != len(options):
        raise ValueError(
            f"calibration needs a score for each of {len(options)} options and each prompt, got "
            f"scores of shape {tuple(scores.shape)}"
        )


def _log_probs(scores: Float[Tensor, "n n_options"]) -> Float[Tensor, "n n_options"]:
    """Returns log-probabilities over the options, in float32 on the processor."""
    # Infinity less infinity is NaN, which whoever asks looks for.
    with np.errstate(invalid="ignore"):
        log_probs = log_probabilities(scores.detach().cpu().double().numpy())
    return torch.from_numpy(np.asarray(log_probs)).float()


def mixture_of(prompts: Sequence[str]) -> str:
    """Returns a sentence where prompts look like those of several tasks; empty where they do not.

    A task's prompts end alike, with the line that asks for the answer.
    """
    endings = Counter(prompt.rsplit("\n", 1)[-1] for prompt in prompts)
    # Where a text of the row's own stands at the end, nearly every prompt has another.
    if not 1 < len(endings) <= len(prompts) / 4:
        return ""
    listed = ", ".join(f"{ending[-40:]!r} ({n})" for ending, n in endings.most_common(4))
    return (
        f"these prompts end in {len(endings)} ways, {listed}: a prior over several tasks' prompts "
        "is that of none; calibrate each task by itself"
    )
