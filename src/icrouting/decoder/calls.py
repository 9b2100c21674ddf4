"""Calls: what a decoder, or its `generate`, was given."""

import inspect
from typing import Any

from torch import Tensor, nn

from icrouting.decoder.families import CACHE


def called_with(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's call by name."""
    return named(inspect.signature(module.forward), args, kwargs)


def named(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, given the signature of what was called."""
    arguments = signature.bind_partial(*args, **kwargs).arguments
    # What a signature gathers in **kwargs counts like the rest.
    gathered = arguments.pop("kwargs", {})
    return arguments | gathered


def read_by(arguments: dict[str, Any]) -> Tensor:
    """Returns the token ids, or else the embeddings, among a decoder's arguments."""
    input_ids = arguments.get("input_ids")
    return arguments["inputs_embeds"] if input_ids is None else input_ids


def cache_of(arguments: dict[str, Any]) -> Any:
    """Returns the cache among the arguments of a decoder or of `generate`, under either name."""
    return arguments.get(CACHE, arguments.get("past_key_values"))


def n_seen(arguments: dict[str, Any]) -> int:
    """Returns the tokens in that cache."""
    cache = cache_of(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def generate_ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the token ids among the arguments of `generate`, which takes them in three places."""
    for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")):
        if isinstance(value, Tensor):
            return value
    return None
