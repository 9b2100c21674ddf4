"""A model while it is routed: every plain call is routed by the prompt it is given (section 5)."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache

from icrouting.decoder.batches import attended
from icrouting.decoder.calls import asked, cache_of, called_with, n_seen
from icrouting.decoder.families import CACHE
from icrouting.decoder.hold import replaced
from icrouting.decoder.partial import entering_of
from icrouting.routing.attach import Attachment, attach
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing


@dataclass(frozen=True)
class _Prompt:
    """Tokens that a routing is for, and which of them are real; `cache` is the one that they fill."""

    input_ids: Int[Tensor, "batch q_len"]
    is_real: Bool[Tensor, "batch q_len"]
    cache: Cache | None

    def token_lists(self) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(self.input_ids, self.is_real, strict=True)]


class _Rerouter:
    """Gives every forward pass the routing of its prompt.

    A prefill (no cache, or an empty one) is routed by its own tokens, once the states that enter the first routed
    layer are there. The routing is kept with the cache that the prefill fills, and holds for every later step with
    that cache. Inside `generate` the routing of the prompt holds for every forward, however the prompt is cut or
    speculated on.
    """

    def __init__(self, reader: Reader, attachment: Attachment):
        self._reader, self._attachment = reader, attachment
        self._of_cache: weakref.WeakKeyDictionary[Cache, Routing] = weakref.WeakKeyDictionary()
        self._generating: _Prompt | None = None
        self._held: Routing | None = None
        self._pending: _Prompt | None = None
        self._is_reading = False
        self.last: list[list[int]] = []

    def generate(self, plain_generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_generate` with one routing for all of its forwards: the cache's, or the prompt's."""
        if (
            self._held is not None or self._generating is not None
        ):  # it drafts for itself: a draft is no prompt
            return plain_generate(*args, **kwargs)
        input_ids, cache = asked(args, kwargs), cache_of(kwargs)
        if n_seen(kwargs) > 0:
            self._held = self._of_cache.get(cache)
        elif input_ids is not None:
            self._generating = _Prompt(
                input_ids, attended(input_ids, kwargs.get("attention_mask")), cache
            )
        try:
            return plain_generate(*args, **kwargs)
        finally:
            self._held = self._generating = self._pending = None

    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._is_reading:
            return
        given = called_with(decoder, args, kwargs)
        cache = cache_of(given)
        self._pending = None
        if self._held is not None:
            self._use(self._held, cache)
        elif self._generating is None and n_seen(given) > 0:
            if cache not in self._of_cache:
                raise ValueError(
                    "this cache is unknown here: it was filled outside `attached`, or is a copy; "
                    "start from the prompt inside it"
                )
            self._use(self._of_cache[cache], cache)
        else:
            input_ids = given.get("input_ids")
            if input_ids is None:
                raise ValueError(
                    "a routed model needs `input_ids` to be routed by, got `inputs_embeds` alone"
                )
            self._await(_Prompt(input_ids, attended(input_ids, given.get("attention_mask")), cache))

    def _await(self, prompt: _Prompt) -> None:
        """Lets the first routed layer route by `prompt`; by the whole one where `generate` cuts or goes beyond it."""
        self._attachment.routing = None
        whole = self._generating
        n_tokens = whole.input_ids.shape[1] if whole else prompt.input_ids.shape[1]
        if whole and prompt.input_ids.shape[1] < n_tokens:
            self._is_reading = True
            try:
                self.last[:] = whole.token_lists()
                self._use(self._reader.of_tokens(self.last), prompt.cache)
            finally:
                self._is_reading = False
        else:
            self._pending = _Prompt(
                prompt.input_ids[:, :n_tokens], prompt.is_real[:, :n_tokens], prompt.cache
            )

    def at_first_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        prompt = self._pending
        if prompt is not None:
            hidden = entering_of(args, kwargs)[:, : prompt.is_real.shape[1]]
            states = [
                row[keep]
                for row, keep in zip(hidden, prompt.is_real.to(hidden.device), strict=True)
            ]
            self.last[:] = prompt.token_lists()
            self._use(self._reader.of_states(self.last, states), prompt.cache)

    def _use(self, routing: Routing, cache: Cache | None) -> None:
        self._pending, self._attachment.routing = None, routing
        if self._generating is not None:
            self._held = routing
        if cache is not None:
            self._of_cache[cache] = routing

    def after_forward(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        cache = output.get(CACHE) if isinstance(output, dict) else None
        if (
            isinstance(cache, Cache)
            and cache not in self._of_cache
            and self._attachment.routing is not None
        ):
            self._of_cache[cache] = self._attachment.routing


@contextmanager
def rerouted(reader: Reader, pids: PIDs) -> Iterator[list[list[int]]]:
    """Inside, plain calls of the reader's model are routed; on leaving, the model is as it was found.

    Yields the tokens of the prompts that were routed last, kept up to date.
    """
    decoder = reader.decoder
    model = decoder.model
    first = decoder.layers[reader.first_layer]
    with attach(model, pids) as attachment, ExitStack() as stack:
        rerouter = _Rerouter(reader, attachment)
        stack.callback(
            decoder.stack.register_forward_pre_hook(
                rerouter.before_forward, with_kwargs=True
            ).remove
        )
        stack.callback(
            first.register_forward_pre_hook(rerouter.at_first_layer, with_kwargs=True).remove
        )
        stack.callback(decoder.stack.register_forward_hook(rerouter.after_forward).remove)
        plain_generate: Callable = model.generate  # pyright: ignore[reportAssignmentType]
        stack.enter_context(replaced(model, generate=partial(rerouter.generate, plain_generate)))
        yield rerouter.last
