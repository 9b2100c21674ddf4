"""Priors: what a model answers to a task's prompts whatever they ask, from its scores alone.

Batch calibration (Zhou et al. 2023) takes the mean over a batch of prompts for it. That mean holds
two things: how the model leans, which is to be taken away, and which labels are frequent, which is
not. Where labels are skewed, plain batch calibration does harm. "guarded" tells the two apart.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

# What is averaged over the prompts: an option's log-probability, or its probability. "guarded"
# finds the lean and the labels' shares by clusters of prompts (`guarded_prior`).
Way = Literal["batch", "batch-probability", "guarded"]
WAYS: tuple[Way, ...] = ("batch", "batch-probability", "guarded")

Scores = Float[np.ndarray, "n_prompts n_options"]
Prior = Float[np.ndarray, "n_options"]

# "guarded" counts each label's prompts with a share of the batch more, and so many at least: fewer
# guard skewed tasks more, and cost the others more (`benchmarks.calibrating`).
EVEN_SHARE = 0.25
FEWEST_EVEN = 10
# By how many deviations labels lie apart at least, where their shares are given back.
LEAST_APART = 0.3
# In squared nats: of a batch of equal prompts.
LEAST_VARIANCE = 1e-6
# The second start has to fit better by more, lest rounding chooses.
LEAST_BETTER = 1e-6
# Clusters are iterated until nothing moves by more, or so often.
LEAST_MOVE = 1e-5
MOST_ROUNDS = 200


def fewest_prompts(n_options: int) -> int:
    """Returns of how many prompts a prior can be estimated, at least."""
    return max(2, n_options)


def log_probabilities(scores: Scores) -> Scores:
    """Returns each prompt's log-probabilities over its options."""
    return scores - logsumexp(scores, axis=1, keepdims=True)


def log_prior(scores: Scores, way: Way = "batch") -> Prior:
    """Returns what is to be taken away from each option's log-probability, up to a constant.

    An option that is ruled out on a prompt (-inf) has no part in the mean there. Where one is,
    "guarded" is "batch": prompts with other options open have no place in one picture.

    Args:
        scores: the options' logits, or summed log-probabilities, of a task's prompts.
        way: how the prior is estimated.

    Raises:
        ValueError: there are fewer prompts than options, or fewer than two of either.
    """
    n_prompts, n_options = scores.shape
    if n_options < 2 or n_prompts < fewest_prompts(n_options):
        raise ValueError(
            f"batch calibration needs two options or more, and as many prompts as options: "
            f"got {n_prompts} prompts of {n_options} options"
        )
    log_probs = log_probabilities(scores)
    is_open = np.isfinite(log_probs)
    if way == "batch-probability":
        return _log_mean_probability(log_probs)
    if way == "batch" or not is_open.all():
        # An option that is ruled out everywhere is ruled out whatever its prior: it needs none.
        n_open = np.maximum(is_open.sum(0), 1)
        return np.where(is_open, log_probs, 0.0).sum(0) / n_open
    return guarded_prior(log_probs)


def _log_mean_probability(log_probs: Scores) -> Prior:
    """Returns the logarithm of each option's mean probability, over the prompts that have it."""
    n_open = np.isfinite(log_probs).sum(0)
    # Long labels' summed log-probabilities may lie further apart than a probability can.
    logs = logsumexp(log_probs, axis=0) - np.log(np.maximum(n_open, 1))
    return np.where(n_open > 0, logs, 0.0)


def guarded_prior(log_probs: Scores) -> Prior:
    r"""Returns the prior that leaves the labels' shares in, up to a constant.

    A prompt whose label is y is taken to have the centred log-probabilities

        c = m + d (e_y - 1/k) + noise of variance v

    with m the lean of the model, d how far labels lie apart, and k the number of labels, of which
    each has a share p. By Bayes the answer is the largest c - m + (v / d) log p: so the prior is
    m - (v / d) log p. All are found by expectation and maximisation. On sure answers that is where
    the clusters part, however large they are (as in prototypical calibration, Han et al. 2023).
    Where the model cannot tell labels apart, p stays even, and the prior is the batch's mean.

    Args:
        log_probs: of a batch of prompts, all finite.
    """
    centred = log_probs - log_probs.mean(1, keepdims=True)
    # From the batch's mean on, and from no lean at all: where most prompts have one label, the mean
    # lies inside its cluster, and would cut it in two.
    from_mean = clusters(centred, centred.mean(0))
    from_none = clusters(centred, np.zeros(centred.shape[1]))
    best = from_mean
    if from_none.fit > from_mean.fit + LEAST_BETTER:
        best = from_none
    apart = max(best.apart, LEAST_APART * np.sqrt(best.variance))
    return best.lean - best.variance / apart * np.log(best.shares)


@dataclass(frozen=True)
class Clusters:
    """What the prompts of each label look like (`guarded_prior`).

    Attributes:
        lean: m, of the model.
        apart: d, how far labels lie apart.
        variance: v, of the noise.
        shares: p, of the labels.
        fit: the logarithm of the posterior, up to a constant.
    """

    lean: Prior
    apart: float
    variance: float
    shares: Prior
    fit: float


def clusters(centred: Scores, lean: Prior) -> Clusters:
    """Returns clusters of centred log-probabilities, by expectation and maximisation.

    Args:
        centred: log-probabilities less each prompt's mean.
        lean: where to begin.
    """
    n_prompts, n_labels = centred.shape
    # The square of e_y - 1/k, for every label y, and the dimensions of a centred row.
    length = 1 - 1 / n_labels
    n_numbers = n_prompts * (n_labels - 1)
    n_even = max(FEWEST_EVEN, EVEN_SHARE * n_prompts)
    # Half of what varies is taken for the labels' doing, at first.
    total = max(np.square(centred - lean).sum() / n_numbers, LEAST_VARIANCE)
    apart = float(np.sqrt(total))
    variance = total / 2
    shares = np.full(n_labels, 1 / n_labels)
    for _ in range(MOST_ROUNDS):
        likelihoods = apart * (centred - lean) / variance + np.log(shares)
        posterior = np.exp(log_probabilities(likelihoods))
        last_lean = lean
        last_shares = shares
        lean = centred.mean(0) - apart * (posterior.mean(0) - 1 / n_labels)
        gaps = centred - lean
        along = (posterior * gaps).sum()
        apart = max(along / (n_prompts * length), 0.0)
        left = np.square(gaps).sum() - 2 * apart * along + n_prompts * apart**2 * length
        variance = max(left / n_numbers, LEAST_VARIANCE)
        counts = posterior.sum(0) + n_even
        shares = counts / counts.sum()
        moves = np.abs(np.concatenate([lean - last_lean, shares - last_shares]))
        if moves.max() < LEAST_MOVE:
            break
    gaps = centred - lean
    squares = np.square(gaps).sum(1, keepdims=True) - 2 * apart * gaps + apart**2 * length
    densities = np.log(shares) - squares / (2 * variance)
    fit = np.asarray(logsumexp(densities, axis=1)).sum() - n_numbers / 2 * np.log(variance)
    fit += n_even * np.log(shares).sum()
    return Clusters(lean, apart, variance, shares, float(fit))


def without_prior(scores: Scores, way: Way = "batch") -> Scores:
    """Returns each prompt's log-probabilities over its options, less their prior over all of them.

    An option that is ruled out on a prompt (-inf) stays ruled out. Arguments and errors are those
    of `log_prior`.
    """
    return log_probabilities(scores) - log_prior(scores, way)
