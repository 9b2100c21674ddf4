"""Attaching routed attention to a loaded model, and leaving it as it was found.

Per routed layer: forward hooks catch queries and keys before rotary embedding; a pre-hook on the
attention module swaps the cache for a view whose `update` widens keys and values before they are
stored; and an attention function, registered under a name of ours beside a mask function of the
same name, widens the query and calls the model's own kernel.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from icrouting.decoder.families import attention_of, base_of, dims_of, family_of
from icrouting.decoder.hold import check_alone, hooked
from icrouting.decoder.kernels import attention_function
from icrouting.decoder.sites import Dims, watched
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

_CACHE_NAMES = ("cache", "past_key_values", "layer_past")

# An attention function is handed its module alone, and finds here what belongs to it.
_routed: weakref.WeakKeyDictionary[nn.Module, "RoutedLayer"] = weakref.WeakKeyDictionary()


class _Directions:
    """One layer's directions, wherever the states are that they project."""

    def __init__(self, directions: Tensor):
        self._directions = directions

    def project(self, states: Tensor) -> Tensor:
        """Returns states along the directions, which stay on the states' device from then on."""
        directions = self._directions.to(states.device)
        # The control "icr-learned-directions" trains them: what is kept must be what is trained,
        # not a copy.
        if not self._directions.requires_grad:
            self._directions = directions
        return project(states, directions)


class RoutedLayer:
    """What one attention module needs while it is routed.

    Attributes:
        attachment: that of all routed layers.
        position: its place among the routed layers.
        rank: columns that queries, keys and values get.
        store: the current tokens' "query" and "key" before rotary embedding.
        query_directions: what these queries are projected on.
        key_directions: what these keys are projected on.
    """

    def __init__(
        self, attachment: "Attachment", position: int, pids: PIDs, store: dict[str, Tensor]
    ):
        self.attachment = attachment
        self.position = position
        self.rank = pids.rank
        self.store = store
        self.query_directions = _Directions(pids.query_directions()[position])
        self.key_directions = _Directions(pids.key_directions()[position])

    def widen_cached(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the current tokens, widened."""
        z_key = self.key_directions.project(self.store["key"])
        return widen_key(key, z_key), widen_value(value, self.rank)

    def widen_queries(self, query: Tensor, weights: Tensor) -> Tensor:
        """Returns queries of the current tokens, widened; `weights` have a row for each row."""
        z_query = self.query_directions.project(self.store["query"])
        return widen_query(query, z_query, weights)

    def swap_cache(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Puts a view in the cache's place that widens what is stored: the module's pre-hook."""
        for name in _CACHE_NAMES:
            if kwargs.get(name) is not None:
                return args, {**kwargs, name: _WideningCache(kwargs[name], self)}
        return None


class _WideningCache:
    """A cache as one attention module sees it: what it stores is widened first."""

    def __init__(self, cache: Cache, layer: RoutedLayer):
        self._cache: Any = cache
        self._layer = layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Stores widened keys and values, and returns all that are stored."""
        key, value = self._layer.widen_cached(key, value)
        self._make_room(layer_idx, key, value)
        return self._cache.update(key, value, layer_idx, *args, **kwargs)

    def _make_room(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        """Allocates an empty layer again that was allocated ahead, for the plain width."""
        layers = self._cache.layers
        # A dynamic cache may have no such layer yet.
        if layer_idx >= len(layers):
            return
        layer = layers[layer_idx]
        width = key.shape[-1]
        if getattr(layer, "k_head_dim", width) != width and int(layer.get_seq_length()) == 0:
            layer.lazy_initialization(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass
class _Placed:
    """A routing as a batch needs it.

    Attributes:
        routing: the routing that this was made of.
        n_rows: the rows of the batch.
        repeated: the routing with a row for each of them; None where it adds nothing.
        weights: those of the layers that ran, by their place among the routed ones.
    """

    routing: Routing
    n_rows: int
    repeated: Routing | None
    weights: dict[int, Tensor] = field(default_factory=dict)


class Attachment:
    """A model's routed layers while attached.

    Attributes:
        routing: the next pass's, one row per query; None makes a pass an error.
    """

    def __init__(self):
        self.routing: Routing | None = None
        self._placed: _Placed | None = None

    def weights_for(
        self, position: int, n_rows: int, scaling: float, device: torch.device
    ) -> Tensor | None:
        """Returns one layer's weights, one row per batch row.

        None where they add nothing and are not being trained.
        """
        placed = self._place(n_rows)
        if placed.repeated is None:
            return None
        if position in placed.weights:
            return placed.weights[position]
        alpha = placed.repeated.routing_vector[:, position, None, None]
        gates = placed.repeated.head_gates[:, position, :, None, None]
        weights = (gates * alpha / scaling).to(device)
        # In training each layer computes its own, also when checkpointing runs it again: it counts
        # what is computed.
        if not (alpha.requires_grad or gates.requires_grad):
            placed.weights[position] = weights
        return weights

    def _place(self, n_rows: int) -> _Placed:
        """Returns the routing in force for a batch, which all layers of a pass share."""
        routing = self.routing
        if routing is None:
            raise ValueError("the model is attached but has no routing: call it with `input_ids`")
        placed = self._placed
        if placed is None or placed.routing is not routing or placed.n_rows != n_rows:
            repeated = routing.repeated(n_rows) if _adds(routing) else None
            placed = self._placed = _Placed(routing, n_rows, repeated)
        return placed


def _adds(routing: Routing) -> bool:
    """Returns whether a routing adds anything to any row, or is being trained to."""
    alpha = routing.routing_vector
    # In training an alpha of zero, where every router starts, must get its gradient.
    if alpha.requires_grad:
        return True
    has_gates = routing.head_gates.any((1, 2))
    return bool((alpha.any((1, 2)) & has_gates).any())


def _attention_function(original: str) -> Callable:
    """Returns an attention function that widens in routed layers and calls `original`'s kernel."""

    def routed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kernel = _kernel(original, module)
        width = query.shape[-1]
        layer = _routed.get(module)
        weights = None
        if layer is not None:
            n_rows = query.shape[0]
            weights = layer.attachment.weights_for(layer.position, n_rows, scaling, query.device)
        if layer is None or weights is None:
            # Wider heads may round differently, so columns that add nothing are left out.
            if key.shape[-1] != width:
                key = key[..., :width].contiguous()
                value = value[..., :width].contiguous()
            return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        # Where there is a cache, it has widened them.
        if key.shape[-1] == width:
            key, value = layer.widen_cached(key, value)
        query = layer.widen_queries(query, weights)
        output, attn_weights = kernel(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output[..., : -layer.rank].contiguous(), attn_weights

    return routed_attention


def _kernel(name: str, module: nn.Module) -> Callable:
    """Returns a kernel; each family has an eager one of its own, in its modelling file."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    modelling_file = sys.modules[type(module).__module__]
    kernel = getattr(modelling_file, "eager_attention_forward", None)
    assert kernel is not None, f"{type(module).__name__} has no eager attention function"
    return kernel


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
    base = base_of(model)
    family = family_of(model)
    dims = dims_of(model)
    check_alone(base, "icr")
    check_layers(pids.layers, dims.n_layers)
    _check_widths(pids, dims)
    attachment = Attachment()
    with ExitStack() as leaving:
        for position, index in enumerate(pids.layers):
            attention = attention_of(model, index)
            store = leaving.enter_context(watched(attention, family, dims))
            layer = RoutedLayer(attachment, position, pids, store)
            _routed[attention] = layer
            leaving.callback(_routed.pop, attention)
            leaving.enter_context(
                attention.register_forward_pre_hook(layer.swap_cache, with_kwargs=True)
            )
        leaving.enter_context(routed_kernel(base))
        leaving.enter_context(hooked(base, "icr"))
        yield attachment


def _check_widths(pids: PIDs, dims: Dims) -> None:
    """Checks that directions are as wide as a model's queries and keys."""
    query_width = dims.n_heads * dims.head_dim
    key_width = dims.n_kv_heads * dims.head_dim
    pids_query_width = pids.query_pids.shape[1]
    pids_key_width = pids.key_pids.shape[1]
    if (pids_query_width, pids_key_width) != (query_width, key_width):
        raise ValueError(
            f"the PIDs are for queries and keys {pids_query_width} and {pids_key_width} wide, this "
            f"model's are {query_width} and {key_width}: use the base model that the router was "
            "fitted on"
        )
