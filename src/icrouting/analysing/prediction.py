"""Prediction: how well numbers are told from others by ridge regression, on rows held out (R2)."""

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

STRENGTHS = np.logspace(0, 6, 13)


def predicted(known: np.ndarray, wanted: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns what ridge regression, learned on known rows, predicts for others.

    Args:
        known: what is read of the known rows, [n_known, n_features].
        wanted: what belongs to them, [n_known, ...].
        asked: what is read of the others, [n_asked, n_features].
    """
    regression = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS))
    flat = wanted.reshape(len(wanted), -1)
    return regression.fit(known, flat).predict(asked).reshape(-1, *wanted.shape[1:])


def r2(
    true: Float[np.ndarray, "n n_layers rank"],
    guessed: Float[np.ndarray, "n n_layers rank"],
    mean: np.ndarray,
) -> float:
    """Returns the share of the squares about a mean that is explained, a mean over layers."""
    left = ((true - guessed) ** 2).sum((0, 2))
    whole = ((true - mean) ** 2).sum((0, 2))
    return float((1 - left / whole).mean())
