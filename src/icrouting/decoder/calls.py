"""Calls: what a decoder, or its `generate`, was given, and which of those tokens answer the prompt."""

import inspect
from typing import Any

from torch import Tensor, nn

from icrouting.decoder.families import CACHE


def called_with(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's call by name."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return given | given.pop("kwargs", {})


def read_by(given: dict[str, Any]) -> Tensor:
    """Returns the token ids, or else the embeddings, among a decoder's arguments."""
    return given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]


def cache_of(given: dict[str, Any]) -> Any:
    """Returns the cache among the arguments of a decoder or of `generate`, under either of its names."""
    return given.get(CACHE, given.get("past_key_values"))


def n_seen(given: dict[str, Any]) -> int:
    """Returns the tokens in that cache."""
    return 0 if (cache := cache_of(given)) is None else int(cache.get_seq_length())


def asked(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the token ids among the arguments of `generate`."""
    given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    return next((value for value in given if isinstance(value, Tensor)), None)
