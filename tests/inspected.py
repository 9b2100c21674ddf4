"""Routers of tiny models that decide something, without a training."""

import torch

import tiny
from icrouting.config import FitConfig
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter

OPTIONS = ("negative", "positive")
LAYERS = (3, 4)


def sharp_router(model, tokenizer, encoder, monkeypatch):
    """A router whose decisions are far from neutral and differ between prompts."""
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    small = {
        "rank": 3,
        "n_prompts": 12,
        "demos_per_class": 1,
        "n_queries": 2,
        "hidden_width": 13,
        "epochs": 1,
        "min_steps": 0,
        "patience": 0,
    }
    config = FitConfig(layers=LAYERS, encoder=str(encoder), **small)
    icr = InContextRouter.fit(model, tokenizer, [tiny.task()], config)
    generator = torch.Generator().manual_seed(0)
    for parameter in icr.router.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator)
    return icr


def prompts():
    return [tiny.task().prompt(example) for example in tiny.task().test]
