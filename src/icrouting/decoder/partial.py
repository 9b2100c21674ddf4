"""Partial passes: up to the first routed layer, and from there on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, layers_of
from icrouting.decoder.guards import of_this_thread
from icrouting.decoder.passes import next_token_logits

# Padded tokens of a pass that is run for the states which enter a layer.
TRUNK_TOKEN_BUDGET = 4096

# From a batch and the states that enter the first late layer, the logits after each row.
LateEntry = Callable[
    [Batch, Float[Tensor, "batch q_len hidden_size"]], Float[Tensor, "batch vocab"]
]


class _Reached(Exception):
    """The first routed layer is reached, and nothing behind it is needed."""


@torch.no_grad()
def entering_states(
    decoder: Decoder, token_lists: Sequence[Sequence[int]], first: int
) -> list[Float[Tensor, "q_len hidden_size"]]:
    """Returns what enters layer `first` for every prompt; no layer from there on runs."""
    states_by_row: list[Tensor] = [torch.empty(0)] * len(token_lists)
    with watch_entering(decoder.model, first, stop=True) as entered:
        for group in by_length(token_lists, decoder.token_budget or TRUNK_TOKEN_BUDGET):
            group_lists = [token_lists[row] for row in group]
            batch = pad(group_lists, decoder.pad_id).to(decoder.device)
            with suppress(_Reached):
                decoder.stack(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask.long(),
                    use_cache=False,
                )
            for row, hidden in zip(group, entered.pop(), strict=True):
                states_by_row[row] = hidden[: len(token_lists[row])]
    return states_by_row


@contextmanager
def watch_entering(model: PreTrainedModel, first: int, *, stop: bool) -> Iterator[list[Tensor]]:
    """Inside, every pass appends what enters layer `first` to the yielded list.

    With `stop` it ends there, by an exception that `entering_states` awaits.
    """
    entered: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        entered.append(entering_of(args, kwargs))
        if stop:
            raise _Reached

    hook = of_this_thread(keep)
    with layers_of(model)[first].register_forward_pre_hook(hook, with_kwargs=True):
        yield entered


def entering_of(args: tuple, kwargs: dict) -> Float[Tensor, "batch q_len hidden_size"]:
    """Returns the hidden states among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


class _PassThrough(nn.Module):
    """Stands in for a trunk layer: hands on what it got or, where it holds states, those."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.states is None else self.states


class _Checkpointed(nn.Module):
    """Stands in for a layer with activation checkpointing.

    transformers heeds that in training mode alone.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.is_off_loaded = any(parameter.is_meta for parameter in layer.parameters())

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        checkpoint = cast(Callable, self.layer._gradient_checkpointing_func)
        if not self.is_off_loaded:
            return checkpoint(self.layer, *args, **kwargs)
        # Else the backward would stop inside the layer, once it has what it needs, and the weight
        # that was brought in last would stay.
        with set_checkpoint_early_stop(False):
            return checkpoint(self.layer, *args, **kwargs)


@contextmanager
def late_entry(model: PreTrainedModel, first: int) -> Iterator[LateEntry]:
    """Inside, the layers below `first` are bridged.

    The model's own forward still builds masks and rotary tables. What is yielded returns the logits
    after each row's last token, from a batch and the states that enter layer `first`. With `first`
    = 0 there is no trunk and every pass is a whole one.
    """
    layers = layers_of(model)
    original_layers = list(layers)
    bridges = [_PassThrough() for _ in original_layers[:first]]
    late_layers: list[nn.Module] = []
    for layer in original_layers[first:]:
        is_checkpointed = getattr(layer, "gradient_checkpointing", False)
        late_layers.append(_Checkpointed(layer) if is_checkpointed else layer)

    def logits_of(
        batch: Batch, hidden: Float[Tensor, "batch q_len hidden_size"]
    ) -> Float[Tensor, "batch vocab"]:
        if bridges:
            # The first bridge drops the embeddings; the others hand on what it gives.
            bridges[0].states = hidden.to(device_of(model))
        return next_token_logits(model, batch)

    with ExitStack() as cleanup:
        for index, stand_in in enumerate([*bridges, *late_layers]):
            cleanup.callback(layers.__setitem__, index, original_layers[index])
            layers[index] = stand_in
        yield logits_of
