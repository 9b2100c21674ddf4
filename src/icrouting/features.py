"""Features of a query, E(x), and the routing that the router reads from them (section 3).

The paper's features are a sentence encoder's. The backbone's own hidden state entering the first routed layer
needs no second model, no second tokenizer and no further pass: routing starts where it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.batches import context_length, pad_id_of, tokenize
from icrouting.config import HIDDEN
from icrouting.encoder import load_encoder, query_texts
from icrouting.families import decoder_of, device_of
from icrouting.router import Router, Routing
from icrouting.trunk import entering_states

Scale = tuple[Float[Tensor, "n_features"], Float[Tensor, "n_features"]]


@runtime_checkable
class Features(Protocol):
    """What turns prompts into vectors.

    Attributes:
        n_features: how many numbers describe a prompt.
        fingerprint: identifies what computes them.
        reads_hidden: whether they depend on the hidden states.
    """

    n_features: int
    fingerprint: str
    reads_hidden: bool

    def __call__(
        self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Float[Tensor, "q_len hidden_size"]]
    ) -> Float[Tensor, "batch n_features"]:
        """Returns the features of prompts, in float32.

        Args:
            token_lists: each prompt's tokens.
            hidden: each prompt's states entering the first routed layer; may be empty unless `reads_hidden`.
        """
        ...

    def scale(self, features: Float[Tensor, "n_queries n_features"]) -> Scale:
        """Returns the mean and standard deviation that training takes out of its queries' features."""
        ...


class SentenceFeatures:
    """A frozen sentence encoder on the text that the prompt's tokens stand for (the paper's features)."""

    reads_hidden = False

    def __init__(self, name: str, device: str, tokenizer: PreTrainedTokenizerBase):
        self._encoder, self._tokenizer = load_encoder(name, device), tokenizer
        self.n_features, self.fingerprint = self._encoder.n_features, self._encoder.fingerprint

    def __call__(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        """Returns the encoder's vectors, of variance one per feature."""
        return self._encoder(query_texts(self._tokenizer, token_lists))

    def scale(self, features: Tensor) -> Scale:
        """Returns no change, since the encoder's vectors are scaled."""
        return torch.zeros(self.n_features), torch.ones(self.n_features)


class HiddenFeatures:
    """The backbone's state at the prompt's last token, entering the first routed layer.

    Differs: the paper reads a sentence encoder. A backbone's channels differ in size by orders of magnitude, so
    training sees them standardised over its queries.
    """

    reads_hidden = True
    fingerprint = HIDDEN

    def __init__(self, model: PreTrainedModel):
        self.n_features = int(decoder_of(model).config.hidden_size)

    def __call__(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        """Returns each prompt's last state."""
        return torch.stack([states[-1].float() for states in hidden])

    def scale(self, features: Tensor) -> Scale:
        """Returns the mean and standard deviation over the queries."""
        std = features.std(0, correction=0)
        return features.mean(0), std.clamp_min(torch.finfo(std.dtype).eps)


def features_of(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str) -> Features:
    """Returns the features that `FitConfig.encoder` names; a sentence encoder runs on `device`."""
    return HiddenFeatures(model) if name == HIDDEN else SentenceFeatures(name, device, tokenizer)


@dataclass(frozen=True)
class Reader:
    """Reads prompts: features and router as one.

    Attributes:
        model: the base model.
        tokenizer: its tokenizer.
        features: what the router reads.
        router: the trained router.
        first_layer: the first routed layer.
        scale: factor on the routing vector.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    features: Features
    router: Router
    first_layer: int
    scale: float

    @torch.no_grad()
    def of_states(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Routing:
        """Returns the routing of prompts, given the states that enter the first routed layer."""
        # Beams and samples repeat their query; each is read once.
        first: dict[tuple[int, ...], int] = {}
        rows = [first.setdefault(tuple(tokens), row) for row, tokens in enumerate(token_lists)]
        chosen = list(first.values())
        features = self.features([token_lists[row] for row in chosen], [hidden[row] for row in chosen if hidden])
        routing = self.router(features.to(device_of(self.router))).scaled(self.scale)
        places = torch.tensor([chosen.index(row) for row in rows], device=routing.head_gates.device)
        return Routing(routing.routing_vector[places], routing.head_gates[places])

    def of_tokens(self, token_lists: Sequence[Sequence[int]]) -> Routing:
        """Returns the routing of prompts; the model runs only up to the first routed layer, and only if read."""
        hidden: Sequence[Tensor] = ()
        if self.features.reads_hidden:
            hidden = entering_states(self.model, token_lists, self.first_layer, pad_id_of(self.tokenizer))
        return self.of_states(token_lists, hidden)

    def of_prompts(self, prompts: Sequence[str]) -> Routing:
        """Returns the routing of prompts' texts."""
        return self.of_tokens(tokenize(self.tokenizer, prompts, context_length(self.model)))
