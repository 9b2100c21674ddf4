"""Priors: what a model answers to a task's prompts whatever they ask, from its scores alone.

Batch calibration (Zhou et al. 2023) takes the mean over a batch of prompts for it. That mean holds
two things: how the model leans, which is to be taken away, and which labels are frequent, which is
not. Where the labels are skewed, plain batch calibration does harm; "guarded" estimates their
shares, without a label, and gives them back.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

# What is averaged over the prompts: an option's log-probability, or its probability; "guarded" does
# the latter, and gives the labels' estimated shares back.
Way = Literal["batch", "batch-probability", "guarded"]
WAYS: tuple[Way, ...] = ("batch", "batch-probability", "guarded")

Scores = Float[np.ndarray, "n_prompts n_options"]
Prior = Float[np.ndarray, "n_options"]

# Further prompts of each label that "guarded" counts with: fewer of them guard skewed tasks more,
# and cost others more (`benchmarks.calibrating`).
N_EVEN_LABELS = 30
# The shares of labels are iterated until they move by less, or so often.
LEAST_MOVE = 1e-6
MOST_ROUNDS = 1000


def fewest_prompts(n_options: int) -> int:
    """Returns of how many prompts a prior can be estimated, at least."""
    return max(2, n_options)


def log_probabilities(scores: Scores) -> Scores:
    """Returns each prompt's log-probabilities over its options."""
    return scores - logsumexp(scores, axis=1, keepdims=True)


def log_prior(scores: Scores, way: Way = "batch") -> Prior:
    """Returns what is to be taken away from each option's log-probability, up to a constant.

    An option that is ruled out on a prompt (-inf) has no part in the mean there.

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
    if way == "batch":
        is_open = np.isfinite(log_probs)
        # An option that is ruled out everywhere is ruled out whatever its prior: it needs none.
        n_open = np.maximum(is_open.sum(0), 1)
        return np.where(is_open, log_probs, 0.0).sum(0) / n_open
    lean = _log_mean_probability(log_probs)
    if way == "batch-probability":
        return lean
    return lean - np.log(label_shares(log_probs - lean))


def _log_mean_probability(log_probs: Scores) -> Prior:
    """Returns the logarithm of each option's mean probability, over the prompts that have it."""
    n_open = np.maximum(np.isfinite(log_probs).sum(0), 1)
    shares = np.exp(log_probs).sum(0) / n_open
    return np.log(np.where(shares > 0, shares, 1.0))


def label_shares(likelihoods: Scores) -> Prior:
    """Returns the share of each label among prompts, without a look at any label.

    It is the maximum of their posterior by expectation and maximisation (Saerens et al. 2002),
    under N_EVEN_LABELS further prompts of each label, which keep a few sure answers from making
    one label everything.

    Args:
        likelihoods: the logarithm of how well each label fits each prompt, up to a constant for
            each prompt.
    """
    n_labels = likelihoods.shape[1]
    shares = np.full(n_labels, 1 / n_labels)
    for _ in range(MOST_ROUNDS):
        posterior = np.exp(log_probabilities(likelihoods + np.log(shares)))
        counts = posterior.sum(0) + N_EVEN_LABELS
        last_shares = shares
        shares = counts / counts.sum()
        if np.abs(shares - last_shares).max() < LEAST_MOVE:
            break
    return shares


def without_prior(scores: Scores, way: Way = "batch") -> Scores:
    """Returns each prompt's log-probabilities over its options, less their prior over all of them.

    An option that is ruled out on a prompt (-inf) stays ruled out. Arguments and errors are those
    of `log_prior`.
    """
    return log_probabilities(scores) - log_prior(scores, way)
