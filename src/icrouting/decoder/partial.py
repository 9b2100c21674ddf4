"""Partial passes: up to the first routed layer, and from there on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, layers_of
from icrouting.decoder.passes import next_token_logits

TOKEN_BUDGET = 4096


LateEntry = Callable[
    [Batch, Float[Tensor, "batch q_len hidden_size"]], Float[Tensor, "batch vocab"]
]


class _Reached(Exception):
    """The first routed layer is reached, and nothing behind it is needed."""


@torch.no_grad()
def entering_states(
    decoder: Decoder, token_lists: Sequence[Sequence[int]], first: int
) -> list[Float[Tensor, "q_len hidden_size"]]:
    """Returns what enters layer `first` for every prompt; the layers from there on do not run."""
    entered: list[Tensor] = [torch.empty(0)] * len(token_lists)
    with _entering(decoder.model, first, stop=True) as entering:
        for group in by_length(token_lists, TOKEN_BUDGET):
            batch = pad([token_lists[i] for i in group], decoder.pad_id).to(decoder.device)
            with suppress(_Reached):
                decoder.stack(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask.long(),
                    use_cache=False,
                )
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


class _PassThrough(nn.Module):
    """Stands in for a trunk layer: hands on what it got or, where it holds states, those."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.states is None else self.states


class _Checkpointed(nn.Module):
    """Stands in for a layer with activation checkpointing, which transformers heeds in training mode alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.layer._gradient_checkpointing_func(self.layer, *args, **kwargs)  # pyright: ignore[reportCallIssue]


@contextmanager
def late_entry(model: PreTrainedModel, first: int) -> Iterator[LateEntry]:
    """Inside, the layers below `first` are bridged; the model's own forward builds masks and rotary tables.

    What is yielded returns the logits after each row's last token, given a batch and the states that enter layer
    `first`. With `first` = 0 there is no trunk and every pass is a whole one.
    """
    layers = layers_of(model)
    kept = list(layers)
    bridges = [_PassThrough() for _ in kept[:first]]
    late = [
        _Checkpointed(lay) if getattr(lay, "gradient_checkpointing", False) else lay
        for lay in kept[first:]
    ]

    def logits_of(
        batch: Batch, hidden: Float[Tensor, "batch q_len hidden_size"]
    ) -> Float[Tensor, "batch vocab"]:
        if bridges:
            bridges[0].states = hidden.to(device_of(model))
        return next_token_logits(model, batch)

    with ExitStack() as stack:
        for index, stand_in in enumerate([*bridges, *late]):
            stack.callback(layers.__setitem__, index, kept[index])
            layers[index] = stand_in
        yield logits_of
