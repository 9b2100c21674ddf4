"""The frozen trunk: the layers below the first routed one run once per example, not once per epoch.

Routing starts at layer `first`. What enters it is the same for the plain and for the routed pass and in
every epoch, so it is kept, and training runs the layers from `first` on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.batches import Batch, by_length, pad
from icrouting.families import decoder_of, device_of, layers_of
from icrouting.losses import entropy
from icrouting.progress import track
from icrouting.scoring import next_token_logits

TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class TrunkState:
    """What one prompt leaves behind.

    `hidden` is what enters the first routed layer, [q_len, hidden_size], in the model's dtype; `entropy` that of
    the plain model's next-token distribution, in nats.
    """

    tokens: list[int]
    hidden: Tensor
    entropy: float


class _Reached(Exception):
    """The first routed layer is reached, and nothing behind it is needed."""


@torch.no_grad()
def entering_states(
    model: PreTrainedModel, token_lists: Sequence[Sequence[int]], first: int, pad_id: int
) -> list[Float[Tensor, "q_len hidden_size"]]:
    """Returns what enters layer `first` for every prompt; the layers from there on do not run."""
    entered: list[Tensor] = [torch.empty(0)] * len(token_lists)
    decoder = decoder_of(model)
    with _entering(model, first, stop=True) as entering:
        for group in by_length(token_lists, TOKEN_BUDGET):
            batch = pad([token_lists[i] for i in group], pad_id).to(device_of(model))
            with suppress(_Reached):
                decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
            for row, hidden in zip(group, entering.pop(), strict=True):
                entered[row] = hidden[: len(token_lists[row])]
    return entered


@contextmanager
def _entering(model: PreTrainedModel, first: int, *, stop: bool) -> Iterator[list[Tensor]]:
    """Inside, every pass appends what enters layer `first`, and ends there with `stop`."""
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.append(entering_of(args, kwargs))
        if stop:
            raise _Reached

    with layers_of(model)[first].register_forward_pre_hook(keep, with_kwargs=True):
        yield entering


def entering_of(args: tuple, kwargs: dict) -> Float[Tensor, "batch q_len hidden_size"]:
    """Returns the hidden states among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def run_trunk(
    model: PreTrainedModel,
    token_lists: Sequence[list[int]],
    first: int,
    pad_id: int,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> list[TrunkState]:
    """Returns the trunk state of every prompt, from one plain pass each; `first` is the first routed layer."""
    states: list[TrunkState | None] = [None] * len(token_lists)
    groups = list(by_length(token_lists, token_budget))
    with _entering(model, first, stop=False) as entering:
        for group in track(groups, "trunk", [len(group) for group in groups], "queries"):
            batch = pad([token_lists[i] for i in group], pad_id).to(device_of(model))
            entropies = entropy(next_token_logits(model, batch)).tolist()
            hidden = entering.pop().cpu()
            for row, index in enumerate(group):
                tokens = token_lists[index]
                states[index] = TrunkState(tokens, hidden[row, : len(tokens)].clone(), entropies[row])
    return [state for state in states if state is not None]


class _PassThrough(nn.Module):
    """Stands in for a trunk layer: hands on what it got or, where it holds states, those."""

    def __init__(self) -> None:
        super().__init__()
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.states is None else self.states


class _Checkpointed(nn.Module):
    """Stands in for a layer with activation checkpointing, which transformers heeds in training mode alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.layer._gradient_checkpointing_func(self.layer, *args, **kwargs)  # pyright: ignore[reportCallIssue]


class LateEntry:
    """A model whose trunk is bridged: a forward starts from kept hidden states."""

    def __init__(self, model: PreTrainedModel, entry: _PassThrough | None):
        self._model = model
        self._entry = entry

    def next_token_logits(
        self, batch: Batch, hidden: Float[Tensor, "batch q_len hidden_size"]
    ) -> Float[Tensor, "batch vocab"]:
        """Returns the logits after each row's last token, given what enters the first routed layer."""
        if self._entry is not None:
            self._entry.states = hidden.to(device_of(self._model))
        return next_token_logits(self._model, batch)


@contextmanager
def late_entry(model: PreTrainedModel, first: int) -> Iterator[LateEntry]:
    """Inside, the layers below `first` are bridged; the model's own forward builds masks and rotary tables.

    With `first` = 0 there is no trunk and every pass is a whole one.
    """
    layers = layers_of(model)
    kept = list(layers)
    bridges = [_PassThrough() for _ in kept[:first]]
    late = [_Checkpointed(lay) if getattr(lay, "gradient_checkpointing", False) else lay for lay in kept[first:]]
    try:
        for index, stand_in in enumerate([*bridges, *late]):
            layers[index] = stand_in
        yield LateEntry(model, bridges[0] if bridges else None)
    finally:
        for index, layer in enumerate(kept):
            layers[index] = layer


def pad_states(states: Sequence[TrunkState], pad_id: int) -> tuple[Batch, Tensor]:
    """Returns trunk states as one batch: tokens and hidden states, padded on the right."""
    batch = pad([state.tokens for state in states], pad_id)
    hidden = torch.nn.utils.rnn.pad_sequence([state.hidden for state in states], batch_first=True)
    return batch, hidden
