"""Batch calibration: each option's mean score taken away, from what a run recorded.

It needs no label, no demonstration and no forward pass: of a task's items, the mean over them says
what the model answers whatever it is asked (Zhou et al. 2023). It is a layer over every method, so
that what a method adds to it can be asked. It assumes that the options are about equally frequent,
and does harm where they are not.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from icrouting.routing.priors import Way, fewest_prompts, without_prior


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
    if has_nan or n_options < 2 or n_items < fewest_prompts(n_options):
        return None
    return without_prior(scores, way).argmax(1)
