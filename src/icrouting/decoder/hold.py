"""Holds: a model is one method's alone, keeps its own methods, and takes no gradients meanwhile."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from icrouting.decoder.families import base_of

# The name of the method that holds each model, None for none.
_held: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and takes no gradients; then it is as it was found."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.eval().requires_grad_(False)
        yield


@contextmanager
def replaced(model: nn.Module, **methods: Callable) -> Iterator[None]:
    """Inside, a model has other methods, on the instance alone; then it has again what it had."""
    attributes = vars(model)
    # What already stood there on the instance, over the methods of its class.
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            attributes.pop(name, None)
        attributes.update(before)


def check_alone(model: nn.Module, name: str) -> None:
    """Checks that no method is attached to a model: another would learn under it, or add to it.

    ValueError names the one that is.
    """
    other = _held.get(base_of(model))
    if other is not None:
        raise ValueError(
            f"{other} is attached to this model: leave it before {name} is fitted or attached"
        )


@contextmanager
def hooked(base: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, a model is a method's alone, refuses `generate_batch`, and runs uncompiled.

    To be entered once its hooks are in place, which may hold the model themselves, as a router's
    do.
    """
    before = _held.get(base)
    _held[base] = name
    try:
        with (
            replaced(base, init_continuous_batching=_refuse_packing),
            # A compiled graph does not notice hooks.
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        _held[base] = before


def _refuse_packing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "an attached model cannot batch continuously, which packs all prompts into one row: "
        "pad them"
    )
