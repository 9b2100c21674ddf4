"""Space: where prompts lie among all routings, and what of a few-shot trace a prompt foretells.

The map is a PCA of alpha and gamma side by side. A few-shot trace is the query of a few-shot
prompt's last token, in the routed layers; its coefficients are its projections on the router's
query directions. How well ridge regression tells them from the zero-shot prompt alone says what a
router could know: R2 on rows held out, from what the router reads (features) and from what it gives
(alpha). An R2 of 0 is no better than the mean, below it is worse.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold

from icrouting.analysing.prediction import predicted, r2
from icrouting.analysing.study import Study
from icrouting.decoder.partial import entering_states
from icrouting.routing.router import Routing

N_FOLDS = 4
WITHIN = "within the task"
ACROSS = "from the other tasks"
READS = {"features": "what the router reads", "alpha": "what the router gives"}


def space(study: Study) -> dict[str, pd.DataFrame]:
    """Returns two tables.

    "map": a line for each prompt, its task, and its places on the first two components; `share_1`
    and `share_2` are the shares of variance that these have. "prediction": by task, what is read
    ("features" or "alpha") and how it is held out, the R2 of few-shot coefficients about the mean
    of the task's own known rows (within) or of the other tasks' (across), mean over layers; NaN
    where there are too few prompts or one task alone.
    """
    places, shares = flat_map(study.routing)
    points = []
    for item, (x, y) in zip(study.items, places, strict=True):
        line = {"task": item.task, "is_seen": study.is_seen(item.task), "x": x, "y": y}
        points.append({**line, "share_1": shares[0], "share_2": shares[1]})
    reads = {"features": _features(study), "alpha": study.routing.routing_vector.flatten(1).numpy()}
    true = coefficients(study)
    lines = []
    for reading, values in reads.items():
        lines += _predictions(study, reading, values.astype(float), true)
    return {"map": pd.DataFrame(points), "prediction": pd.DataFrame(lines)}


def flat_map(routing: Routing) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "2"]]:
    """Returns two coordinates of each prompt's routing, and the shares of variance they have."""
    parts = [routing.routing_vector.flatten(1), routing.head_gates.flatten(1)]
    points = torch.cat(parts, 1).double().numpy()
    # Routings that are all one, or one prompt alone, have no direction in which they differ.
    if len(points) < 2 or np.ptp(points, axis=0).max() == 0:
        return np.zeros((len(points), 2)), np.zeros(2)
    pca = PCA(2, svd_solver="full").fit(points)
    return pca.transform(points), pca.explained_variance_ratio_


def coefficients(study: Study) -> Float[np.ndarray, "n_items n_layers rank"]:
    """Returns the projections of few-shot prompts' last queries on the router's directions."""
    queries = study.few_shot_traces.queries
    return torch.einsum("nlw,lwr->nlr", queries, study.icr.pids.query_pids.cpu()).double().numpy()


def _features(study: Study) -> np.ndarray:
    """What the router reads of each zero-shot prompt, [n_items, n_features]."""
    features = study.reader.features
    states = []
    if features.reads_hidden:
        states = entering_states(study.decoder, study.queries, study.layers[0])
    return features.read(study.queries, states).cpu().double().numpy()


def _predictions(
    study: Study, reading: str, values: np.ndarray, true: np.ndarray
) -> Iterator[dict]:
    for task in study.tasks:
        rows = study.rows_of(task)
        others = [row for row in range(len(study.items)) if row not in set(rows)]
        line = {"task": task, "reads": reading}
        within = float("nan")
        if len(rows) >= 2 * N_FOLDS:
            within = held_out_r2(values[rows], true[rows])
        yield {**line, "held_out": WITHIN, "n": len(rows), "r2": within}
        across = float("nan")
        if others:
            guessed = predicted(values[others], true[others], values[rows])
            across = r2(true[rows], guessed, true[others].mean(0))
        yield {**line, "held_out": ACROSS, "n": len(rows), "r2": across}


def held_out_r2(values: Float[np.ndarray, "n n_read"], true: np.ndarray) -> float:
    """Returns the R2 of rows each predicted by the others, about the mean of these others."""
    guessed = np.zeros_like(true)
    means = np.zeros_like(true)
    for known, asked in KFold(N_FOLDS, shuffle=True, random_state=0).split(values):
        guessed[asked] = predicted(values[known], true[known], values[asked])
        means[asked] = true[known].mean(0)
    return r2(true, guessed, means)
