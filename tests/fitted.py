"""Methods fitted on tiny tasks."""

from dataclasses import replace

import numpy as np
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.icr import InContextRouter
from icrouting.routing.gate import PromptGate

SMALL = {"demos_per_class": 2, "i2cl_epochs": 1, "tries": 2, "train_rows": 8, "train_epochs": 1}


def fit_method(method, model, tokenizer, tasks, seed=0, file=None):
    """A method, fitted on some tasks."""
    method.fit(model, tokenizer, list(tasks), np.random.default_rng(seed), file)
    return method


def small_fit(**changes):
    """Settings of a router's fit of moments, which nothing watches and no encoder reads."""
    usual = {"layers": (3, 4), "rank": 3, "n_prompts": 12, "demos_per_class": 1, "n_queries": 12}
    usual |= {"encoder": HIDDEN, "epochs": 1, "min_steps": 0, "patience": 0}
    return FitConfig(**usual | changes)


def strict(icr: InContextRouter) -> InContextRouter:
    """The router of a tiny model with a gate that knows no prompt."""
    hidden_size = tiny.model("llama").config.hidden_size
    gate = PromptGate.of([torch.randn(30, hidden_size) for _ in icr.description.tasks])
    numbers = replace(gate.numbers, limits=tuple(1e-9 for _ in gate.numbers.limits))
    return replace(icr, gate=replace(gate, numbers=numbers))
