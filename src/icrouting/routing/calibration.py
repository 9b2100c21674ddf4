"""Calibration in use: a task's prior, from prompts without labels, taken away from new scores."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import chi2
from torch import Tensor

from icrouting.routing.priors import Way, fewest_prompts, log_prior, log_probabilities

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
            ValueError: there are fewer prompts than options, or fewer than two of either.
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

        It is the p-value of Hotelling's test of two means, by its limit for many prompts; prompts
        of another task have one of 0, as far as their scores tell.
        """
        new = _log_probs(scores).double()
        known = self.log_probs.double()
        # Each row's probabilities add up to 1: the last option follows from the others.
        new = (new - new[:, -1:])[:, :-1]
        known = (known - known[:, -1:])[:, :-1]
        gap = new.mean(0) - known.mean(0)
        both = torch.cat([new - new.mean(0), known - known.mean(0)])
        covariance = both.T @ both / max(1, len(both) - 2)
        covariance += LEAST_VARIANCE * torch.eye(len(gap), dtype=torch.float64)
        scale = len(new) * len(known) / (len(new) + len(known))
        distance = scale * gap @ torch.linalg.solve(covariance, gap)
        return float(chi2.sf(float(distance), len(gap)))


class CalibrationStream:
    """A calibration that goes along: each batch of scores joins the estimate, then gets it.

    Until there are as many prompts as options, scores come back as log-probabilities, as they are.
    After n prompts `calibration` is that of a batch of those n. The one that is taken away is
    estimated anew when one prompt in a hundred is new, since "guarded" takes tens of milliseconds.

    Attributes:
        way: how the prior is estimated.
        calibration: the estimate so far; None before there are prompts enough.
        n_prompts: how many prompts it has seen.
    """

    def __init__(self, way: Way = DEFAULT_WAY):
        self.way: Way = way
        self.calibration: BatchCalibration | None = None
        self._applied: BatchCalibration | None = None
        self._waiting: list[Tensor] = []
        self._options: tuple[str, ...] | None = None
        self._asked_of: str | None = None

    @property
    def n_prompts(self) -> int:
        """How many prompts it has seen."""
        if self.calibration is not None:
            return self.calibration.n_prompts
        return sum(len(scores) for scores in self._waiting)

    def __repr__(self) -> str:
        return f"CalibrationStream({self.n_prompts} prompts, {self.way!r})"

    def adjusted(
        self, scores: Float[Tensor, "n n_options"], options: Sequence[str], asked_of: str = ""
    ) -> Float[Tensor, "n n_options"]:
        """Returns log-probabilities over the options, less their prior over all prompts so far.

        Raises:
            ValueError: the options, or what gave the scores, are others than before.
        """
        self.check(options, asked_of)
        self._options = tuple(options)
        self._asked_of = asked_of
        if self.calibration is not None and self._applied is not None:
            self.calibration = self.calibration.with_scores(scores)
            if self.calibration.n_prompts >= (1 + RENEWED_AT) * self._applied.n_prompts:
                self._applied = self.calibration
            return self._applied.adjusted(scores, options, asked_of)
        self._waiting.append(scores)
        if self.n_prompts < fewest_prompts(len(options)):
            return scores.log_softmax(-1)
        seen = torch.cat(self._waiting)
        self._waiting.clear()
        self.calibration = BatchCalibration.of(seen, options, self.way, asked_of)
        self._applied = self.calibration
        return self.calibration.adjusted(scores, options, asked_of)

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


def _log_probs(scores: Float[Tensor, "n n_options"]) -> Float[Tensor, "n n_options"]:
    """Returns log-probabilities over the options, in float32 on the processor."""
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
