"""The reader: features and router as one, from prompts to routing (section 3)."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of
from icrouting.decoder.partial import entering_states
from icrouting.routing.features import Features
from icrouting.routing.gate import Decisions
from icrouting.routing.router import Router, Routing, Spread
from icrouting.routing.sources import FormWatch
from icrouting.runtime.defaults import usual_defaults

Gate = Callable[[Sequence[Tensor]], Float[Tensor, "batch"]]


class PromptReader(Protocol):
    """What a model is routed by: it gives prompts their routing, one row each."""

    @property
    def decoder(self) -> Decoder:
        """The model that is routed, with its tokenizer."""
        ...

    @property
    def first_layer(self) -> int:
        """The first routed layer, whose entering states `of_states` is given."""
        ...

    def of_states(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Routing:
        """Returns the routing of prompts, given the states that enter the first routed layer."""
        ...

    def of_tokens(self, token_lists: Sequence[Sequence[int]]) -> Routing:
        """Returns the routing of prompts."""
        ...


@dataclass(frozen=True)
class Reader:
    """Reads prompts: features and router as one.

    Attributes:
        decoder: the model that is routed, with its tokenizer.
        features: what the router reads of a prompt.
        router: what reads it.
        first_layer: the first routed layer.
        scale: factor on the routing vector.
        gate: gives each prompt a further factor, from the states that enter the first routed layer;
            None is 1.
        spread: whose magnitude is spread evenly, as a control; None leaves the routing as it is.
        forms: looks at the form of prompts; None does not.
        decisions: notes what the gate says, for who asks.
    """

    decoder: Decoder
    features: Features
    router: Router
    first_layer: int
    scale: float
    gate: Gate | None = None
    spread: Spread | None = None
    forms: FormWatch | None = None
    decisions: Decisions = field(default_factory=Decisions)

    @usual_defaults()
    @torch.no_grad()
    def of_states(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Routing:
        """Returns the routing of prompts, given the states that enter the first routed layer.

        Args:
            token_lists: the tokens of each prompt.
            hidden: the states, [q_len, hidden_size] each; empty where neither features nor gate
                read them.
        """
        if self.forms is not None:
            self.forms.look_at(token_lists)
        read_rows, places = self._distinct(token_lists)
        states = [hidden[row] for row in read_rows if hidden]
        features = self.features.read([token_lists[row] for row in read_rows], states)
        device = device_of(self.router)
        # The router is small, and trained in float32.
        with torch.autocast(device.type, enabled=False):
            routing = self.router(features.to(device))
        # Before it is scaled, as a negative strength is to keep its sign.
        if self.spread is not None:
            routing = routing.spread(self.spread)
        routing = routing.scaled(self.scale)
        if self.gate is not None:
            factors = self._factors(self.gate, routing, states)
            self.decisions.note([token_lists[row] for row in read_rows], factors)
            routing = routing.scaled(factors[:, None, None])
        index = torch.tensor(places, device=routing.head_gates.device)
        return Routing(routing.routing_vector[index], routing.head_gates[index])

    @usual_defaults()
    @torch.no_grad()
    def of_tokens(self, token_lists: Sequence[Sequence[int]]) -> Routing:
        """Returns the routing of prompts.

        The model runs only up to the first routed layer, and only where that is read.
        """
        # Neither encoders nor models read a list of no texts.
        if not token_lists:
            device = device_of(self.router)
            return self.router(torch.zeros(0, self.features.n_features, device=device))
        hidden: Sequence[Tensor] = ()
        if self.features.reads_hidden or self.gate is not None:
            hidden = entering_states(self.decoder, token_lists, self.first_layer)
        return self.of_states(token_lists, hidden)

    def _distinct(self, token_lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Returns the rows to be read, and for every row which of these stands for it."""
        # Beams and samples repeat their query, and a text is read once.
        place_of: dict[Hashable, int] = {}
        read_rows: list[int] = []
        places: list[int] = []
        for row, tokens in enumerate(token_lists):
            # Hidden states depend on more than the tokens, so that each row counts for itself.
            key = row if self.features.reads_hidden else tuple(tokens)
            if key not in place_of:
                place_of[key] = len(read_rows)
                read_rows.append(row)
            places.append(place_of[key])
        return read_rows, places

    @staticmethod
    def _factors(gate: Gate, routing: Routing, states: Sequence[Tensor]) -> Float[Tensor, "batch"]:
        """Returns the gate's factors, where and as the routing vectors are."""
        factors = torch.as_tensor(gate(states)).to(routing.routing_vector)
        if factors.shape != (len(states),) or not factors.isfinite().all():
            raise ValueError(
                f"`gate` must give a finite factor for each of {len(states)} prompts, got {factors}"
            )
        return factors
