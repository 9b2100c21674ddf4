"""Methods fitted on tiny tasks."""

import numpy as np

SMALL = {"demos_per_class": 2, "i2cl_epochs": 1, "tries": 2, "train_rows": 8, "train_epochs": 1}


def fit_method(method, model, tokenizer, tasks, seed=0, file=None):
    """A method, fitted on some tasks."""
    method.fit(model, tokenizer, list(tasks), np.random.default_rng(seed), file)
    return method
