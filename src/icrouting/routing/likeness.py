"""Likeness: whether rows that are calibrated are like those that their prior was estimated from."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from icrouting.routing.calibration import UNLIKELY, BatchCalibration
from icrouting.routing.predictions import CALIBRATED, Prediction
from icrouting.routing.shipped import TaskCalibration

# Fewer prompts are too easily odd by chance to say anything of.
FEWEST = 30
# More say nothing further; of a long file so many are drawn.
MOST = 2000
# By how many standard deviations the means are apart, at least: of many prompts, any difference
# is more than chance.
LEAST_APART = 0.5


class UnlikePrompts(UserWarning):
    """Prompts are unlike those that their task's prior was estimated from."""


class Likeness:
    """Compares calibrated rows, as they come, with those of the priors that were taken away.

    Args:
        calibrations: those by which rows may have been calibrated, of one task.
    """

    def __init__(self, calibrations: Sequence[TaskCalibration]):
        self._priors = {prior.options: prior for each in calibrations for prior in each.by_options}
        self._drawn: dict[tuple[str, ...], list[Tensor]] = {options: [] for options in self._priors}
        self._counts = dict.fromkeys(self._priors, 0)
        self._rng = np.random.default_rng(0)

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Takes down predictions, of which those that were calibrated count."""
        for prediction in predictions:
            options = tuple(prediction.probabilities)
            if prediction.status != CALIBRATED or options not in self._priors:
                continue
            shares = torch.tensor(list(prediction.probabilities.values()), dtype=torch.float64)
            # As the model had it: the prior was taken away from it.
            log_probs = shares.log() + self._priors[options].log_prior
            if log_probs.isfinite().all():
                self._draw(options, log_probs)

    def _draw(self, options: tuple[str, ...], log_probs: Tensor) -> None:
        """Keeps MOST rows of however many, each as likely as any other."""
        drawn = self._drawn[options]
        self._counts[options] += 1
        if len(drawn) < MOST:
            drawn.append(log_probs)
            return
        place = int(self._rng.integers(self._counts[options]))
        if place < MOST:
            drawn[place] = log_probs

    def sentence(self) -> str:
        """Says that rows are unlike those of the prior; empty where they are not."""
        for options, drawn in self._drawn.items():
            prior = self._priors[options]
            if len(drawn) >= FEWEST and are_unlike(prior, torch.stack(drawn)):
                return (
                    "the rows that were calibrated are answered otherwise than those that the "
                    "prior was estimated from, as rows of another kind, or with other shares of "
                    "the labels, would be: check some by hand, or calibrate on rows like these"
                )
        return ""


def are_unlike(prior: BatchCalibration, scores: Tensor) -> bool:
    """Returns whether prompts are unlike those of a prior by more than chance, and by much."""
    if not prior.log_probs.isfinite().all() or prior.chance_of(scores) >= UNLIKELY:
        return False
    known = centred(prior.log_probs.double())
    new = centred(scores.double())
    deviation = torch.cat([known - known.mean(0), new - new.mean(0)]).square().mean().sqrt()
    gap = (new.mean(0) - known.mean(0)).abs().max()
    return bool(gap > LEAST_APART * deviation)


def centred(log_probs: Tensor) -> Tensor:
    """Returns log-probabilities less each prompt's mean, which says nothing."""
    return log_probs - log_probs.mean(1, keepdim=True)
