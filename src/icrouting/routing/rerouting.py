"""A model while it is routed: every plain call is routed by the prompt it is given (section 5)."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import Cache

from icrouting.decoder.families import CACHE
from icrouting.decoder.partial import entering_of
from icrouting.decoder.tracking import Call, Generation, PromptTokens, tracked
from icrouting.routing.attach import Attachment, attach
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing


def _no_cache() -> None:
    """What stands for a forward without a cache."""


class _Rerouter:
    """Gives every forward pass the routing of its prompt.

    A prefill (no cache, or an empty one) is routed by its own tokens, once the states that enter
    the first routed layer are there. The routing is kept with the cache that the prefill fills, and
    holds for every later step with that cache. Inside `generate` the routing of the prompt holds
    for every forward, whatever else runs meanwhile, and however the prompt is cut or speculated on.

    Attributes:
        last: the tokens of the prompts that were routed last.
    """

    def __init__(self, reader: Reader, attachment: Attachment):
        self.last: list[list[int]] = []
        self._reader = reader
        self._attachment = attachment
        self._routing_by_cache: weakref.WeakKeyDictionary[Cache, Routing]
        self._routing_by_cache = weakref.WeakKeyDictionary()
        # The outermost `generate` that runs, the prompt to route it by, and its routing once that
        # is read.
        self._generation: Generation | None = None
        self._prompts: PromptTokens | None = None
        self._held: Routing | None = None
        # What the first routed layer is to read, and the cache that this forward fills.
        self._pending: PromptTokens | None = None
        self._cache: Callable[[], Cache | None] = _no_cache
        self._is_reading = False

    def before_forward(self, call: Call) -> None:
        """Finds the routing of a forward, or leaves it to the first routed layer to read it."""
        if self._is_reading:
            return
        if call.outermost is not self._generation:
            self._follow(call.outermost)
        self._pending = None
        # Weakly, since a generation that fails must not leave its keys and values alive.
        self._cache = _no_cache if call.cache is None else weakref.ref(call.cache)
        if self._held is not None:
            self._use(self._held)
        elif self._prompts is None and call.n_seen > 0:
            self._use(self._routing_of_cache())
        else:
            self._read(call)

    def _follow(self, generation: Generation | None) -> None:
        """Takes up what a `generate` is routed by: its prompt, or the cache it goes on from."""
        self._generation = generation
        self._prompts = None
        self._held = None
        if generation is None:
            return
        if generation.n_seen > 0:
            self._held = self._routing_by_cache.get(generation.cache)
        else:
            self._prompts = generation.prompts()

    def _routing_of_cache(self) -> Routing:
        """Returns the routing of the cache that this forward goes on from."""
        cache = self._cache()
        routing = None if cache is None else self._routing_by_cache.get(cache)
        if routing is None:
            raise ValueError(
                "this cache is unknown here: it was filled outside `attached`, or is a copy; "
                "start from the prompt inside it"
            )
        return routing

    def _read(self, call: Call) -> None:
        """Has a prompt read: from this forward or, where that is cut, by a pass of its own."""
        tokens = call.tokens
        if tokens is None:
            raise ValueError(
                "a routed model needs `input_ids` to be routed by, got `inputs_embeds` alone"
            )
        # Until the routing is there, a routed layer that runs is an error.
        self._attachment.routing = None
        if self._prompts is None:
            self._pending = tokens
        elif tokens.q_len < self._prompts.q_len:
            self._read_apart(self._prompts)
        else:
            # Drafted tokens may stand behind the prompt.
            self._pending = tokens.first(self._prompts.q_len)

    def _read_apart(self, prompts: PromptTokens) -> None:
        """Reads the routing of whole prompts by a pass of its own, up to the first routed layer."""
        self._is_reading = True
        try:
            self.last[:] = prompts.token_lists()
            self._use(self._reader.of_tokens(self.last))
        finally:
            self._is_reading = False

    def at_first_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads the routing that is pending, from the states that enter the first routed layer."""
        prompts = self._pending
        if prompts is None:
            return
        hidden = entering_of(args, kwargs)[:, : prompts.q_len]
        self.last[:] = prompts.token_lists()
        self._use(self._reader.of_states(self.last, prompts.real(hidden)))

    def _use(self, routing: Routing) -> None:
        """Routes this forward, and all that go on from its prompt."""
        self._pending = None
        self._attachment.routing = routing
        if self._prompts is not None:
            self._held = routing
        cache = self._cache()
        if cache is not None:
            # A routing lives as long as its cache.
            self._routing_by_cache[cache] = routing

    def after_forward(self, stack: nn.Module, args: tuple, output: Any) -> None:
        """Keeps the routing with a cache that the forward made for itself."""
        cache = output.get(CACHE) if isinstance(output, dict) else None
        routing = self._attachment.routing
        if isinstance(cache, Cache) and routing is not None:
            self._routing_by_cache.setdefault(cache, routing)


@contextmanager
def rerouted(reader: Reader, pids: PIDs) -> Iterator[list[list[int]]]:
    """Inside, plain calls of the reader's model are routed; on leaving, it is as it was found.

    Yields the tokens of the prompts that were routed last, kept up to date.
    """
    decoder = reader.decoder
    first_layer = decoder.layers[reader.first_layer]
    with ExitStack() as leaving:
        attachment = leaving.enter_context(attach(decoder.model, pids))
        rerouter = _Rerouter(reader, attachment)
        # The stack is watched, since it may be called by itself.
        leaving.enter_context(tracked(decoder.stack, decoder.model, rerouter.before_forward))
        leaving.enter_context(
            first_layer.register_forward_pre_hook(rerouter.at_first_layer, with_kwargs=True)
        )
        leaving.enter_context(decoder.stack.register_forward_hook(rerouter.after_forward))
        yield rerouter.last
