"""Holds: a model is one method's alone, keeps its own methods, and takes no gradients meanwhile."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from icrouting.decoder.families import base_of


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and takes no gradients; then both are as they were found."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.eval().requires_grad_(False)
        yield


_held: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


@contextmanager
def replaced(model: nn.Module, **methods: Callable) -> Iterator[None]:
    """Inside, a model has other methods, on the instance alone; then it has again what it had."""
    found = {name: vars(model)[name] for name in methods if name in vars(model)}
    vars(model).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(model).pop(name, None)
        vars(model).update(found)


def check_alone(model: nn.Module, name: str) -> None:
    """ValueError while a method is attached to a model: another would learn under it, or add to it."""
    if (other := _held.get(base_of(model))) is not None:
        raise ValueError(
            f"{other} is attached to this model: leave it before {name} is fitted or attached"
        )


@contextmanager
def hooked(base: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, a model is a method's alone, refuses `generate_batch`, and runs uncompiled: graphs notice no hooks.

    To be entered once its hooks are in place, which may hold the model themselves, as a router's do.
    """
    before, _held[base] = _held.get(base), name
    try:
        with (
            replaced(base, init_continuous_batching=_refuse_packing),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        _held[base] = before


def _refuse_packing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "an attached model cannot batch continuously, which packs all prompts into one row: pad them"
    )
