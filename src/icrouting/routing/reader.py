"""The reader: features and router as one, from prompts to routing (section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of
from icrouting.decoder.partial import entering_states
from icrouting.routing.features import Features
from icrouting.routing.router import Router, Routing

Gate = Callable[[Sequence[Tensor]], Float[Tensor, "batch"]]


@dataclass(frozen=True)
class Reader:
    """Reads prompts: features and router as one.

    `scale` is a factor on the routing vector; `gate` gives each prompt a further one, from the states that enter the
    first routed layer; None is 1.
    """

    decoder: Decoder
    features: Features
    router: Router
    first_layer: int
    scale: float
    gate: Gate | None = None

    @torch.no_grad()
    def of_states(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Routing:
        """Returns the routing of prompts, given the states that enter the first routed layer."""
        # Beams and samples repeat their query; a text is read once. Hidden states depend on more than the tokens.
        first: dict[tuple[int, ...], int] = {}
        keys = [
            (row,) if self.features.reads_hidden else tuple(tokens)
            for row, tokens in enumerate(token_lists)
        ]
        rows = [first.setdefault(key, row) for row, key in enumerate(keys)]
        chosen = list(first.values())
        states = [hidden[row] for row in chosen if hidden]
        features = self.features.read([token_lists[row] for row in chosen], states)
        device = device_of(self.router)
        with torch.autocast(device.type, enabled=False):
            routing = self.router(features.to(device)).scaled(self.scale)
        if self.gate is not None:
            factors = torch.as_tensor(self.gate(states)).to(routing.routing_vector)
            if factors.shape != (len(states),) or not factors.isfinite().all():
                raise ValueError(
                    f"`gate` must give a finite factor for each of {len(states)} prompts, got {factors}"
                )
            routing = routing.scaled(factors[:, None, None])
        places = torch.tensor([chosen.index(row) for row in rows], device=routing.head_gates.device)
        return Routing(routing.routing_vector[places], routing.head_gates[places])

    def of_tokens(self, token_lists: Sequence[Sequence[int]]) -> Routing:
        """Returns the routing of prompts; the model runs only up to the first routed layer, and only if read."""
        hidden: Sequence[Tensor] = ()
        if self.features.reads_hidden or self.gate is not None:
            hidden = entering_states(self.decoder, token_lists, self.first_layer)
        return self.of_states(token_lists, hidden)
