"""Checkpoints: whether the weights of a model are those that its files hold, and all of them."""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from icrouting.runtime.defaults import usual_defaults

# How many names an error spells out.
_N_NAMED = 3


@usual_defaults()
def load(kind: Any, name: str | Path, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a model of a kind, and what `from_pretrained` says of how its weights were read."""
    # What does not fit is told by the checks below, all at once.
    return kind.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )


def loading_info_of(model: PreTrainedModel, name: str | None = None) -> dict[str, Any]:
    """Returns what is said of how a model's weights are read, without reading them.

    Args:
        model: one of the kind to load.
        name: what to load; None is what the model itself was loaded from.
    """
    _, loading_info = load(type(model), name or model.config.name_or_path or "", device_map="meta")
    return loading_info


def check_whole(model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    """Checks that a decoder's weights were all read, and that none of its parts has others.

    Weights of parts that the model does not have (a classifier, a vision tower of which only the
    text is loaded) change nothing that it computes: of those there is a warning alone.

    Args:
        model: what was loaded.
        loading_info: what `from_pretrained` says of it, with `ignore_mismatched_sizes`.

    Raises:
        ValueError: weights are missing, of another shape, or more than a part takes; some of them
            are named.
    """
    check_filled(model, loading_info)
    unread = loading_info["unexpected_keys"]
    unread_inside = [name for name in unread if _is_inside(model, name)]
    # A quantised part may come with scales that only other programs read.
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    if unread_inside and not is_quantized:
        raise ValueError(
            f"its files hold {_some(unread_inside)} of parts that {type(model).__name__} has, but "
            "does not read there: its config.json is that of another model"
        )
    if unread:
        warnings.warn(
            f"{model.config.name_or_path}: not read, since {type(model).__name__} has no such "
            f"parts: {_some(unread)}",
            stacklevel=3,
        )


def check_filled(model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    """Checks that all weights of a model were read.

    Raises:
        ValueError: weights are missing or of another shape; some of them are named.
    """
    missing = loading_info["missing_keys"]
    if missing:
        raise ValueError(
            f"its files lack {_some(missing)}, which {type(model).__name__} would make up at "
            "random: expected a whole model of that kind; fetch it again or load another"
        )
    phrases = []
    for name, stored_shape, shape in loading_info["mismatched_keys"]:
        phrases.append(f"{name} of shape {tuple(stored_shape)}, not {tuple(shape)}")
    if phrases:
        raise ValueError(
            f"its files hold {_some(phrases)}: its config.json is that of another model"
        )


def _is_inside(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight's name lies in a part of the decoder: a layer, a norm, an embedding.

    What lies beside these, under the decoder or what holds it, is a part of its own.
    """
    parts = dict(model.named_modules())
    path = name
    while path not in parts:
        path = path.rpartition(".")[0]
    inner_parts = {id(part) for part in model.get_decoder().modules()}
    inner_parts.remove(id(model.get_decoder()))
    inner_parts.add(id(model.get_output_embeddings()))
    return id(parts[path]) in inner_parts


def _some(names: Collection[str]) -> str:
    """Returns how many names there are, and the first of them."""
    first_names = sorted(names)[:_N_NAMED]
    n_more = len(names) - len(first_names)
    listed = ", ".join(first_names)
    if n_more:
        listed += f" and {n_more} more"
    weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    return f"{weights} ({listed})"
