"""The attachment: what routed layers need while a model is attached, and the pass that runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

from icrouting.decoder.guards import Uncopied
from icrouting.decoder.hold import Hold
from icrouting.routing.attention import project, widen_key, widen_query, widen_value
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Routing

# transformers treats names that hold "sdpa", "flash" or "flex" as the kernels of that name.
ROUTED_KERNELS = {
    "eager": "icrouting_eager",
    "sdpa": "icrouting_fused",
    "flash_attention_2": "icrouting_fa2",
    "flash_attention_3": "icrouting_fa3",
}

_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


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


class _LatestStates(threading.local):
    """The current tokens' queries and keys before rotary embedding, each thread's its own.

    Each is taken once: what a forward did not leave must not be read from the one before it.
    """

    def __init__(self):
        self._states: dict[str, Tensor] = {}

    def keep(self, name: str, states: Tensor) -> None:
        """Keeps states under "query" or "key", until they are taken."""
        self._states[name] = states

    def clear(self) -> None:
        """Drops what was kept, where nobody takes it."""
        self._states.clear()

    def take(self, name: str) -> Tensor:
        """Returns what was kept last, once; RuntimeError where nothing was."""
        states = self._states.pop(name, None)
        if states is None:
            raise RuntimeError(
                f"a routed layer's {name} projection did not run, or its hooks are gone: leave "
                "`attached` before you change the model, and attach it again"
            )
        return states


class RoutedLayer(Uncopied):
    """What one attention module needs while it is routed.

    Attributes:
        attachment: that of all routed layers.
        position: its place among the routed layers.
        rank: columns that queries, keys and values get.
        states: the current tokens' queries and keys before rotary embedding.
        query_directions: what these queries are projected on.
        key_directions: what these keys are projected on.
    """

    def __init__(self, attachment: "Attachment", position: int, pids: PIDs):
        self.attachment = attachment
        self.position = position
        self.rank = pids.rank
        self.states = _LatestStates()
        self.query_directions = _Directions(pids.query_directions()[position])
        self.key_directions = _Directions(pids.key_directions()[position])

    def widen_cached(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the current tokens, widened."""
        z_key = self.key_directions.project(self.states.take("key"))
        return widen_key(key, z_key), widen_value(value, self.rank)

    def widen_queries(
        self, query: Tensor, weights: Tensor, first_biased: Tensor | None = None
    ) -> Tensor:
        """Returns queries of the current tokens, widened; `weights` have a row for each row.

        From `first_biased` on, [batch], a row's tokens get the bias; None is from the first on.
        """
        z_query = self.query_directions.project(self.states.take("query"))
        if first_biased is not None:
            columns = torch.arange(z_query.shape[1], device=z_query.device)
            is_biased = columns >= first_biased.to(z_query.device)[:, None]
            z_query = z_query * is_biased[..., None]
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
class RoutedPass:
    """One forward pass: its routing, and that as its batch needs it.

    Attributes:
        routing: one row per query; None makes the first routed layer an error.
        ends: of each query, the column of its prompt's last token, from which on the bias is added;
            None adds it to all.
        n_seen: columns that are in the cache before this pass.
        repeated: by the number of rows, the routing with a row for each; None where it adds
            nothing.
        weights: those of the layers that ran, by their place among the routed ones and the number
            of rows.
        reached: the places of the routed layers whose attention function ran.
    """

    routing: Routing | None = None
    ends: Tensor | None = None
    n_seen: int = 0
    repeated: dict[int, Routing | None] = field(default_factory=dict)
    weights: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)

    def routing_for(self, n_rows: int) -> Routing | None:
        """Returns the routing of a batch, which all layers share; None where it adds nothing."""
        routing = self.routing
        if routing is None:
            raise ValueError(
                "the model is attached but this layer has no routing: call the whole model, with "
                "`input_ids`; no layer by itself, nor by another checkpointing than "
                "`gradient_checkpointing_enable()`"
            )
        if n_rows not in self.repeated:
            self.repeated[n_rows] = routing.repeated(n_rows) if _adds(routing) else None
        return self.repeated[n_rows]

    def first_biased(self, n_rows: int) -> Tensor | None:
        """Returns the first column of each row of this pass that gets the bias, [n_rows].

        None where all columns do, as in every step behind the prompt.
        """
        if self.ends is None:
            return None
        first = (self.ends - self.n_seen).clamp_min(0)
        if not first.any():
            return None
        # As the routing is repeated: those of a query stand side by side.
        return first.repeat_interleave(n_rows // len(first))


class Attachment:
    """A model's routed layers while attached.

    Attributes:
        hold: the hold on the model.
        current: the pass that runs.
    """

    hold: Hold

    def __init__(self):
        self.current = RoutedPass()
        self._is_comparing = False
        # Whether passes run as if nothing were attached.
        self.is_unrouted = False
        # The thread whose pass this is; None where whoever sets `routing` looks after that.
        self._thread: int | None = None
        self._attentions: dict[int, nn.Module] = {}

    @property
    def routing(self) -> Routing | None:
        """The routing of the passes from now on, one row per query."""
        return self.current.routing

    @routing.setter
    def routing(self, routing: Routing | None) -> None:
        self.current = RoutedPass(routing)

    def route(self, routing: Routing, ends: Tensor | None) -> None:
        """Sets `routing`, and the columns of the prompts' last tokens (`RoutedPass.ends`)."""
        self.current = RoutedPass(routing, ends)

    @contextmanager
    def running(self, routed_pass: RoutedPass) -> Iterator[None]:
        """Inside, a pass runs, begun anew or a second time for its gradients, by this thread."""
        pass_before = self.current
        thread_before = self._thread
        self.current = routed_pass
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self.current = pass_before
            self._thread = thread_before

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Inside, passes on the model's own kernel are wanted, and no mistake."""
        self._is_comparing = True
        try:
            yield
        finally:
            self._is_comparing = False

    @contextmanager
    def unrouted(self) -> Iterator[None]:
        """Inside, passes on the model's own kernel are wanted, and the router reads none."""
        with self.comparing():
            self.is_unrouted = True
            try:
                yield
            finally:
                self.is_unrouted = False

    def watch(self, attentions: dict[int, nn.Module]) -> None:
        """Remembers the routed layers' attention modules, by their numbers, for the checks."""
        self._attentions = attentions

    def check(self) -> None:
        """Checks that a pass which begins now would be routed as a whole.

        RuntimeError says what was changed since the model was attached.
        """
        self.hold.hooked_modules.check()
        for attention in self._attentions.values():
            # Where the module itself looks it up.
            config: PretrainedConfig = getattr(attention, "config", self.hold.base.config)
            kernel = config._attn_implementation
            if kernel not in ROUTED_KERNELS.values() and not self._is_comparing:
                raise RuntimeError(
                    f"the attention implementation was set to {kernel!r} while the model is "
                    "attached, which would run unrouted: leave `attached`, set it, and attach "
                    "again (for attention weights load the model with 'eager', and give "
                    "`output_attentions=True` to each call)"
                )

    def check_reached(self, routed_pass: RoutedPass, n_layers: int) -> None:
        """Checks that all routed layers among a model's first `n_layers` ran routed in a pass.

        RuntimeError names the first that did not, whose attention is somebody else's by now.
        """
        if self._is_comparing:
            return
        for position, layer in enumerate(self._attentions):
            if layer < n_layers and position not in routed_pass.reached:
                raise RuntimeError(
                    f"the attention of layer {layer} ran unrouted, as it does not call the model's "
                    "attention function any more: leave `attached` before you change the model"
                )

    def weights_for(
        self, position: int, n_rows: int, scaling: float, device: torch.device
    ) -> Tensor | None:
        """Returns one layer's weights, one row per batch row.

        None where they add nothing and are not being trained.
        """
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "a call that began before the model was attached met the call of another thread: "
                "attach the model while no other thread runs it"
            )
        routed_pass = self.current
        routed_pass.reached.add(position)
        repeated = routed_pass.routing_for(n_rows)
        if repeated is None:
            return None
        key = (position, n_rows)
        if key in routed_pass.weights:
            return routed_pass.weights[key]
        alpha = repeated.routing_vector[:, position, None, None]
        gates = repeated.head_gates[:, position, :, None, None]
        weights = (gates * alpha / scaling).to(device)
        # In training each layer computes its own, also when checkpointing runs it again: it counts
        # what is computed.
        if not (alpha.requires_grad or gates.requires_grad):
            routed_pass.weights[key] = weights
        return weights


def _adds(routing: Routing) -> bool:
    """Returns whether a routing adds anything to any row, or is being trained to."""
    alpha = routing.routing_vector
    # In training an alpha of zero, where every router starts, must get its gradient.
    if alpha.requires_grad:
        return True
    has_gates = routing.head_gates.any((1, 2))
    return bool((alpha.any((1, 2)) & has_gates).any())
