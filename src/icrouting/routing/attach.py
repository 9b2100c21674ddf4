"""Attaching routed attention to a loaded model, and leaving it as it was found.

Per routed layer: forward hooks catch queries and keys before rotary embedding; a pre-hook on the attention module swaps
the cache for a view whose `update` widens keys and values before they are stored; and an attention function, registered
under a name of ours beside a mask function of the same name, widens the query and calls the model's own kernel.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from icrouting.decoder.families import attention_of, base_of, dims_of, family_of
from icrouting.decoder.hold import check_alone, hooked
from icrouting.decoder.kernels import attention_function
from icrouting.decoder.sites import watched
from icrouting.routing.attention import project, widen_key, widen_query, widen_value
from icrouting.routing.pids import PIDs, check_layers
from icrouting.routing.router import Routing

# transformers treats names that hold "sdpa", "flash" or "flex" as the kernels of that name.
_ALIASES = {
    "eager": "icrouting_eager",
    "sdpa": "icrouting_fused",
    "flash_attention_2": "icrouting_fa2",
    "flash_attention_3": "icrouting_fa3",
}

_routed: weakref.WeakKeyDictionary[nn.Module, "RoutedLayer"] = weakref.WeakKeyDictionary()


class RoutedLayer:
    """What one attention module needs while it is routed."""

    def __init__(
        self, attachment: "Attachment", position: int, pids: PIDs, store: dict[str, Tensor]
    ):
        self.attachment, self.position, self.rank, self.store = (
            attachment,
            position,
            pids.rank,
            store,
        )
        self.query_directions, self.key_directions = (
            pids.query_directions()[position],
            pids.key_directions()[position],
        )

    def widen_cached(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the current tokens, widened."""
        states = self.store["key"]
        self.key_directions = _moved(self.key_directions, states.device)
        return widen_key(key, project(states, self.key_directions.to(states.device))), widen_value(
            value, self.rank
        )

    def widen_queries(self, query: Tensor, weights: Tensor) -> Tensor:
        """Queries of the current tokens, widened by weights with a row for each of theirs."""
        states = self.store["query"]
        self.query_directions = _moved(self.query_directions, states.device)
        return widen_query(query, project(states, self.query_directions.to(states.device)), weights)

    def swap_cache(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before the attention module: puts a view that widens what is stored in its cache's place."""
        for name in ("cache", "past_key_values", "layer_past"):
            if kwargs.get(name) is not None:
                return args, {**kwargs, name: _WideningCache(kwargs[name], self)}
        return None


def _moved(directions: Tensor, device: torch.device) -> Tensor:
    """Directions on a device for good; those in training stay, since a copy would not learn."""
    return directions if directions.requires_grad else directions.to(device)


class _WideningCache:
    """A cache as one attention module sees it: what it stores is widened first."""

    def __init__(self, cache: Cache, layer: RoutedLayer):
        self._cache: Any = cache
        self._layer = layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = self._layer.widen_cached(key, value)
        for kept in self._cache.layers[
            layer_idx : layer_idx + 1
        ]:  # allocated ahead, for the plain width
            if (
                getattr(kept, "k_head_dim", key.shape[-1]) != key.shape[-1]
                and int(kept.get_seq_length()) == 0
            ):
                kept.lazy_initialization(key, value)
        return self._cache.update(key, value, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Attachment:
    """A model's routed layers while attached; `routing` is the next pass's, one row per query, or None: an error."""

    def __init__(self):
        self.routing: Routing | None = None
        self._placed: tuple[Routing, int, Routing | None, dict[int, Tensor]] | None = None

    def weights_for(
        self, position: int, n_rows: int, scaling: float, device: torch.device
    ) -> Tensor | None:
        """One layer's weights, one row per batch row; None where they add nothing and are not being trained."""
        if self.routing is None:
            raise ValueError("the model is attached but has no routing: call it with `input_ids`")
        if self._placed is None or self._placed[0] is not self.routing or self._placed[1] != n_rows:
            alpha, gates = self.routing.routing_vector, self.routing.head_gates
            adds = alpha.requires_grad or bool((alpha.any((1, 2)) & gates.any((1, 2))).any())
            self._placed = self.routing, n_rows, self.routing.repeated(n_rows) if adds else None, {}
        routing, kept = self._placed[2:]
        if routing is None or position in kept:
            return kept.get(position)
        alpha, gates = (
            routing.routing_vector[:, position, None, None],
            routing.head_gates[:, position, :, None, None],
        )
        weights = (gates * alpha / scaling).to(device)
        if not (
            alpha.requires_grad or gates.requires_grad
        ):  # checkpointing counts what each layer computes
            kept[position] = weights
        return weights


def _attention_function(original: str) -> Callable:
    """Returns an attention function that widens in routed layers and then calls `original`'s kernel."""

    def routed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        kernel = eager if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
        assert kernel is not None, f"{type(module).__name__} has no eager attention function"
        layer = _routed.get(module)
        weights = layer and layer.attachment.weights_for(
            layer.position, query.shape[0], scaling, query.device
        )
        if layer is None or weights is None:
            if (
                key.shape[-1] != query.shape[-1]
            ):  # wider heads may round differently, so what adds nothing is left out
                key, value = (
                    states[..., : query.shape[-1]].contiguous() for states in (key, value)
                )
            return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if key.shape[-1] == query.shape[-1]:  # no cache has widened them
            key, value = layer.widen_cached(key, value)
        query = layer.widen_queries(query, weights)
        output, attn_weights = kernel(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output[..., : -layer.rank].contiguous(), attn_weights

    return routed_attention


def routed_kernel(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, the model uses our attention function over the kernel that it used before."""
    original = model.config._attn_implementation
    alias = _ALIASES.get(original or "")
    if original is None or alias is None:
        raise ValueError(
            f"attention implementation {original!r} cannot be routed: load the model with "
            f"attn_implementation set to one of {', '.join(map(repr, _ALIASES))}"
        )
    return attention_function(model, alias, _attention_function(original), masks=original)


@contextmanager
def attach(model: nn.Module, pids: PIDs) -> Iterator[Attachment]:
    """Inside, the layers of `pids` are routed by the yielded attachment's `routing`.

    On leaving, also by an exception, hooks and attention implementation are as they were.
    """
    base, family, dims = base_of(model), family_of(model), dims_of(model)
    check_alone(base, "icr")
    check_layers(pids.layers, dims.n_layers)
    expected = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    found = pids.query_pids.shape[1], pids.key_pids.shape[1]
    if expected != found:
        raise ValueError(
            f"the PIDs are for queries and keys {found[0]} and {found[1]} wide, this model's are {expected[0]} and "
            f"{expected[1]}: use the base model that the router was fitted on"
        )
    attachment = Attachment()
    with ExitStack() as stack:
        for position, index in enumerate(pids.layers):
            attention = attention_of(model, index)
            store = stack.enter_context(watched(attention, family, dims))
            _routed[attention] = layer = RoutedLayer(attachment, position, pids, store)
            stack.callback(_routed.pop, attention)
            stack.enter_context(
                attention.register_forward_pre_hook(layer.swap_cache, with_kwargs=True)
            )
        stack.enter_context(routed_kernel(base))
        stack.enter_context(hooked(base, "icr"))
        yield attachment
