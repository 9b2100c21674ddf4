"""Edits: reading and changing what a decoder's blocks and branches give, by hooks that leave no trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.batches import by_length, context_length, pad, pad_id_of, tokenize
from icrouting.families import CACHE, base_of, decoder_of, device_of
from icrouting.scoring import next_token_logits

TOKEN_BUDGET = 4096
Edit = Callable[[int, Tensor], Tensor]


@contextmanager
def edited(modules: Sequence[nn.Module], edit: Edit) -> Iterator[None]:
    """Inside, a module gives what `edit` makes of its place in `modules` and its output, [batch, q_len, hidden_size].

    A module that returns a tuple, as attention does, has the first part edited.
    """

    def hook(place: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (edit(place, output[0]), *output[1:]) if isinstance(output, tuple) else edit(place, output)

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.enter_context(module.register_forward_hook(partial(hook, place)))
        yield


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, the yielded list holds each module's output of the latest forward, in the order of `modules`."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int, output: Tensor) -> Tensor:
        outputs[place] = output
        return output

    with edited(modules, keep):
        yield outputs


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the yielded dict counts the rows that a model runs forwards, and those of them with a gradient.

    A forward whose output has a gradient, or gets one at the vocabulary head, counts as one that is followed by a
    backward.
    """
    rows = {"forwards": 0, "backwards": 0}

    def count(decoder: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0]
        rows["forwards"] += len(hidden)
        head = base_of(model).get_output_embeddings()  # asked for each time, since LoRA may stand in its place
        weights = head.parameters() if head is not None and torch.is_grad_enabled() else ()
        trains_head = any(weight.requires_grad for weight in weights)
        rows["backwards"] += len(hidden) if hidden.requires_grad or trains_head else 0

    with decoder_of(model).register_forward_hook(count):
        yield rows


@contextmanager
def last_tokens(model: nn.Module) -> Iterator[Callable[[Tensor], Int[Tensor, "batch"]]]:
    """Inside, the yielded function gives each row's last attended position in hidden states of this forward."""
    masks: list[Tensor | None] = [None]

    def keep(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        masks[0] = kwargs.get("attention_mask")

    def positions(hidden: Tensor) -> Int[Tensor, "batch"]:
        n_rows, q_len = hidden.shape[:2]
        mask = masks[0] if masks[0] is not None else torch.ones(n_rows, q_len, device=hidden.device)
        return (mask[:, -q_len:].long() * torch.arange(q_len, device=mask.device)).argmax(1)

    with decoder_of(model).register_forward_pre_hook(keep, with_kwargs=True):
        yield positions


def prompt_tokens(args: tuple, kwargs: dict[str, Any]) -> list[list[int]] | None:
    """Returns each row's real tokens in a call of a decoder; None for one token behind a cache, which was generated."""
    input_ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get(CACHE)
    if input_ids is None:
        raise ValueError("this method reads the prompt: give the model `input_ids`, not `inputs_embeds` alone")
    if input_ids.shape[1] == 1 and cache is not None and int(cache.get_seq_length()) > 0:
        return None
    mask = kwargs.get("attention_mask")
    mask = mask[:, -input_ids.shape[1] :].bool() if mask is not None else torch.ones_like(input_ids, dtype=torch.bool)
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def last_of(hidden: Tensor, positions: Int[Tensor, "batch"]) -> Float[Tensor, "batch hidden_size"]:
    """Returns each row's hidden state at its position; some families' branches give all rows in one line."""
    rows = hidden.reshape(len(positions), -1, hidden.shape[-1])
    return rows[torch.arange(len(rows), device=hidden.device), positions.to(hidden.device)]


def added_at(
    hidden: Float[Tensor, "batch q_len hidden_size"],
    rows: Int[Tensor, "n_places"],
    positions: Int[Tensor, "n_places"],
    vectors: Float[Tensor, "*n_places hidden_size"],
) -> Float[Tensor, "batch q_len hidden_size"]:
    """Returns hidden states with vectors, one a place or one for all, added at places, in float32; no place twice."""
    rows, positions = rows.to(hidden.device), positions.to(hidden.device)
    changed = hidden.clone()
    changed[rows, positions] = (hidden[rows, positions].float() + vectors.to(hidden.device)).to(hidden.dtype)
    return changed


@torch.no_grad()
def mean_last_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, modules: Sequence[nn.Module], texts: Sequence[str]
) -> Float[Tensor, "n_modules hidden_size"]:
    """Returns what each module gives at a text's last token, the mean over texts, in float32."""
    token_lists, total = tokenize(tokenizer, texts, context_length(model)), torch.zeros(1)
    with recorded(modules) as outputs:
        for group in by_length(token_lists, TOKEN_BUDGET):
            batch = pad([token_lists[i] for i in group], pad_id_of(tokenizer)).to(device_of(model))
            next_token_logits(model, batch)
            total = total + torch.stack([last_of(output, batch.last).float().sum(0).cpu() for output in outputs])
    return total / len(texts)
