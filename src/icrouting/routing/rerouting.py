"""A model while it is routed: every plain call is routed by the prompt it is given (section 5)."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from icrouting.config import BiasRows
from icrouting.decoder.calls import Call, Generation, PromptTokens
from icrouting.decoder.families import CACHE, attention_of
from icrouting.decoder.guards import Hook, Uncopied, lock_of
from icrouting.decoder.hold import Hold, check_alone, hooked
from icrouting.decoder.partial import entering_of
from icrouting.decoder.tracking import tracked
from icrouting.routing.attach import attach
from icrouting.routing.attachment import Attachment, RoutedPass
from icrouting.routing.checkpointing import checkpointing_followed
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import PromptReader
from icrouting.routing.router import Routing


def _no_cache() -> None:
    """What stands for a forward without a cache."""


@dataclass(frozen=True, eq=False)
class _PromptRouting:
    """The routing of prompts.

    Attributes:
        routing: one row per prompt.
        ends: the columns of the prompts' last tokens; None where the bias is added to all.
    """

    routing: Routing
    ends: Tensor | None


class _Rerouter(Uncopied):
    """Gives every forward pass the routing of its prompt.

    A prefill (no cache, or an empty one) is routed by its own tokens, once the states that enter
    the first routed layer are there. The routing is kept with the cache that the prefill fills, and
    holds for every later step with that cache. Inside `generate` the routing of the prompt holds
    for every forward, whatever else runs meanwhile, and however the prompt is cut or speculated on.

    With `bias_rows` "last" the bias is added from the last token of that prompt on.

    Attributes:
        last: the tokens of the prompts that were routed last.
    """

    def __init__(
        self,
        reader: PromptReader,
        attachment: Attachment,
        take_up_checkpointing: Callable[[], None],
        bias_rows: BiasRows,
    ):
        self.last: list[list[int]] = []
        self._reader = reader
        self._bias_rows = bias_rows
        self._attachment = attachment
        self._take_up_checkpointing = take_up_checkpointing
        self._routing_by_cache: weakref.WeakKeyDictionary[Cache, _PromptRouting]
        self._routing_by_cache = weakref.WeakKeyDictionary()
        # The outermost `generate` that runs, the prompt to route it by, and its routing once that
        # is read.
        self._generation: Generation | None = None
        self._prompts: PromptTokens | None = None
        self._held: _PromptRouting | None = None
        self._forward: _Forward | None = None
        self._is_reading = False

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        """Runs a forward that is due, by the routing of its prompt."""
        if self._is_reading or self._attachment.is_unrouted:
            return run()
        if torch.is_grad_enabled():
            self._take_up_checkpointing()
        forward_before = self._forward
        # One of its own, as a hook of the user may call the model while it runs.
        self._forward = forward = _Forward(call.cache)
        try:
            with self._attachment.running(forward.routed_pass):
                self._find_routing(call, forward)
                output = run()
        finally:
            self._forward = forward_before
        # Early exit runs fewer layers, and says so in the config.
        n_layers = int(self._reader.decoder.stack.config.num_hidden_layers)
        self._attachment.check_reached(forward.routed_pass, n_layers)
        self._note_cache(forward, output)
        return output

    def _find_routing(self, call: Call, forward: "_Forward") -> None:
        """Finds the routing of a forward, or leaves it to the first routed layer to read it."""
        if call.outermost is not self._generation:
            self._follow(call.outermost)
        if self._bias_rows == "last":
            forward.routed_pass.n_seen = call.n_seen
        if self._held is not None:
            self._use(self._held, forward)
        elif self._prompts is None and call.n_seen > 0:
            self._use(self._routing_of(forward), forward)
        else:
            self._read(call, forward)

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

    def _routing_of(self, forward: "_Forward") -> _PromptRouting:
        """Returns the routing of the cache that a forward goes on from."""
        cache = forward.cache()
        routing = None if cache is None else self._routing_by_cache.get(cache)
        if routing is None:
            raise ValueError(
                "this cache is unknown here: it was filled outside `attached`, or is a copy; "
                "start from the prompt inside it"
            )
        return routing

    def _read(self, call: Call, forward: "_Forward") -> None:
        """Has a prompt read: from this forward or, where that is cut, by a pass of its own."""
        tokens = call.tokens
        if tokens is None:
            raise ValueError(
                "a routed model needs `input_ids` to be routed by, got `inputs_embeds` alone"
            )
        if self._prompts is None:
            forward.pending = tokens
        elif tokens.q_len < self._prompts.q_len:
            self._read_apart(self._prompts, forward)
        else:
            # Drafted tokens may stand behind the prompt.
            forward.pending = tokens.first(self._prompts.q_len)

    def _read_apart(self, prompts: PromptTokens, forward: "_Forward") -> None:
        """Reads the routing of whole prompts by a pass of its own, up to the first routed layer."""
        self._is_reading = True
        try:
            self.last[:] = prompts.token_lists()
            routing = self._reader.of_tokens(self.last)
            self._use(self._of_prompts(routing, prompts), forward)
        finally:
            self._is_reading = False

    def at_first_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads the routing that is pending, from the states that enter the first routed layer."""
        forward = self._forward
        # A layer that runs again for its gradients is part of no forward any more.
        if forward is None or forward.pending is None:
            return
        prompts = forward.pending
        hidden = entering_of(args, kwargs)[:, : prompts.q_len]
        self.last[:] = prompts.token_lists()
        routing = self._reader.of_states(self.last, prompts.real(hidden))
        self._use(self._of_prompts(routing, prompts), forward)

    def _of_prompts(self, routing: Routing, prompts: PromptTokens) -> _PromptRouting:
        """Returns a routing with what is to be known of the prompts that it was read from."""
        return _PromptRouting(routing, prompts.ends() if self._bias_rows == "last" else None)

    def _use(self, routing: _PromptRouting, forward: "_Forward") -> None:
        """Routes a forward, and all that go on from its prompt."""
        forward.pending = None
        forward.routed_pass.routing = routing.routing
        forward.routed_pass.ends = routing.ends
        if self._prompts is not None:
            self._held = routing
        cache = forward.cache()
        if cache is not None:
            # A routing lives as long as its cache.
            self._routing_by_cache[cache] = routing

    def _note_cache(self, forward: "_Forward", output: Any) -> None:
        """Keeps the routing with a cache that a forward made for itself."""
        cache = output.get(CACHE) if isinstance(output, dict) else None
        routing = forward.routed_pass.routing
        if isinstance(cache, Cache) and routing is not None:
            prompt_routing = _PromptRouting(routing, forward.routed_pass.ends)
            self._routing_by_cache.setdefault(cache, prompt_routing)


class _Forward:
    """A forward pass that runs.

    Attributes:
        routed_pass: holds its routing, once that is there.
        cache: gives the cache that it fills.
        pending: the tokens that the first routed layer is to read the routing of.
    """

    def __init__(self, cache: Cache | None):
        self.routed_pass = RoutedPass()
        # Weakly, since a generation that fails must not leave its keys and values alive.
        self.cache: Callable[[], Cache | None] = _no_cache if cache is None else weakref.ref(cache)
        self.pending: PromptTokens | None = None


@dataclass(frozen=True)
class Rerouted:
    """A model whose plain calls are routed.

    Attributes:
        hold: the hold on it.
        last: the tokens of the prompts that were routed last, kept up to date.
    """

    hold: Hold
    last: list[list[int]]


@contextmanager
def rerouted(reader: PromptReader, pids: PIDs, bias_rows: BiasRows = "all") -> Iterator[Rerouted]:
    """Inside, plain calls of the reader's model are routed; on leaving, it is as it was found.

    Args:
        reader: reads prompts.
        pids: the directions.
        bias_rows: which rows of attention logits get the bias (`FitConfig.bias_rows`).
    """
    decoder = reader.decoder
    # Here too, so that nobody waits for a call to end and is refused then.
    check_alone(decoder.base, "icr")
    with ExitStack() as leaving:
        # Not between two hooks does another thread's call get its turn.
        with lock_of(decoder.base):
            attachment = leaving.enter_context(attach(decoder.model, pids))
            rerouter = _enter(leaving, reader, attachment, pids, bias_rows)
        try:
            yield Rerouted(attachment.hold, rerouter.last)
        finally:
            with attachment.hold.ending():
                leaving.close()


def _enter(
    leaving: ExitStack,
    reader: PromptReader,
    attachment: Attachment,
    pids: PIDs,
    bias_rows: BiasRows,
) -> _Rerouter:
    """Puts what reroutes an attached model on it, to be taken away on leaving."""
    decoder = reader.decoder
    hold = attachment.hold
    modules = [decoder.stack, *decoder.layers]
    take_up = leaving.enter_context(checkpointing_followed(modules, attachment))
    rerouter = _Rerouter(reader, attachment, take_up, bias_rows)
    # The stack is watched, since it may be called by itself.
    leaving.enter_context(tracked(decoder.stack, decoder.model, rerouter.around, hold))
    first_layer = decoder.layers[reader.first_layer]
    at_first_layer = Hook(rerouter.at_first_layer)
    leaving.enter_context(first_layer.register_forward_pre_hook(at_first_layer, with_kwargs=True))
    hold.hooked_modules.note()
    attachment.watch({layer: attention_of(decoder.model, layer) for layer in pids.layers})
    hold.check = attachment.check
    return rerouter


@contextmanager
def unrouted(reader: PromptReader) -> Iterator[Rerouted]:
    """Inside, the reader's model is held as it is, which is what strength 0 asks for."""
    with hooked(reader.decoder.base, "icr", nullcontext()) as hold:
        yield Rerouted(hold, [])
