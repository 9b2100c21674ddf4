"""Batch calibration: each option's mean score taken away, from what a run recorded.

It needs no label, no demonstration and no forward pass: of a task's items, the mean over them says
what the model answers whatever it is asked (Zhou et al. 2023). It is a layer over every method, so
that what a method adds to it can be asked. It assumes that the options are about equally frequent,
and does harm where they are not.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import logsumexp

# What of an option is averaged over the items: its log-probability, or its probability.
Way = Literal["batch", "batch-probability"]


def without_prior(
    scores: Float[np.ndarray, "n_items n_options"], way: Way = "batch"
) -> Float[np.ndarray, "n_items n_options"]:
    """Returns each item's log-probabilities over its options, less each option's mean over items.

    With "batch" the mean is of log-probabilities, with "batch-probability" of probabilities, and
    its logarithm is taken away. An option that is ruled out on an item (-inf) has no part in the
    mean there, and stays ruled out.

    Args:
        scores: the options' logits, or summed log-probabilities, of a task's items.
        way: what is averaged.

    Raises:
        ValueError: there are fewer items than options, or fewer than two of either.
    """
    n_items, n_options = scores.shape
    if n_options < 2 or n_items < max(2, n_options):
        raise ValueError(
            f"batch calibration needs two options or more, and as many items as options: "
            f"got {n_items} items of {n_options} options"
        )
    log_probs = scores - logsumexp(scores, axis=1, keepdims=True)
    is_open = np.isfinite(log_probs)
    # An option that is ruled out everywhere is ruled out whatever its prior: it needs none.
    n_open = np.maximum(is_open.sum(0), 1)
    if way == "batch":
        prior = np.where(is_open, log_probs, 0.0).sum(0) / n_open
    else:
        shares = np.exp(log_probs).sum(0) / n_open
        prior = np.log(np.where(shares > 0, shares, 1.0))
    return log_probs - prior


def calibrated(lines: pd.DataFrame, way: Way = "batch") -> pd.DataFrame:
    """Returns the records of `metrics.frame` with the predictions that calibration makes of them.

    The batch is what one method answered on one task under one seed, among the items with one
    number of options. Where that is too little to calibrate by, or logits were not kept, records
    are left out: there is no calibrated answer.
    """
    batches = []
    for _, batch in lines.groupby(["method", "task", "seed", "n_options"], sort=False):
        predictions = _predictions(list(batch.option_logits), way)
        if predictions is not None:
            is_right = (batch.label == predictions) * 1.0
            batches.append(batch.assign(prediction=predictions, right=is_right))
    if not batches:
        return lines.head(0)
    # In the records' order, as a report's tables are.
    return pd.concat(batches).sort_index()


def _predictions(option_logits: Sequence[tuple[float, ...]], way: Way) -> np.ndarray | None:
    """Returns the calibrated answers to a batch; None where there is too little to go by."""
    scores = np.array(option_logits, dtype=float)
    n_items, n_options = scores.shape
    # A file of kept answers may lack the logits.
    has_nan = math.isnan(scores.sum(where=~np.isinf(scores)))
    if has_nan or n_options < 2 or n_items < max(2, n_options):
        return None
    return without_prior(scores, way).argmax(1)
