"""Passes: next-token logits of padded batches, behind contexts that are computed once."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, base_of, device_of
from icrouting.decoder.guards import of_this_thread
from icrouting.tasks.prompts import Prompt

# Padded tokens of a pass. A prompt of more than half of it runs alone, and so without a mask.
TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class KeptContext:
    """The tokens that prompts begin with, and the key-value cache that they leave, batch of one."""

    tokens: list[int]
    cache: Cache

    @property
    def n_numbers(self) -> int:
        """Keys and values held, over all layers."""
        n_numbers = 0
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                # Some kinds of layer hold neither, or have not been filled.
                tensor = getattr(layer, name, None)
                if tensor is not None:
                    n_numbers += tensor.numel()
        return n_numbers

    def begins(self, tokens: list[int]) -> bool:
        """Whether a prompt begins with this context and has a token of its own behind it."""
        n_tokens = len(self.tokens)
        return len(tokens) > n_tokens and tokens[:n_tokens] == self.tokens


@contextmanager
def last_position_only(
    model: nn.Module, attention_mask: Bool[Tensor, "batch q_len"]
) -> Iterator[None]:
    """Inside, the model's `logits` are those of each row's last real token, [batch, vocab].

    A hook hands the vocabulary head a contiguous [batch, hidden_size] tensor. `logits_to_keep=1`
    would take the last column, which is padding in most rows, and make the matmul copy the whole
    head once per row.
    """
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * position).argmax(1)

    def gather(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0]
        rows = torch.arange(len(last), device=hidden.device)
        return (hidden[rows, last.to(hidden.device)],)

    head = base_of(model).get_output_embeddings()
    assert head is not None, "a causal language model has a vocabulary head"
    with head.register_forward_pre_hook(of_this_thread(gather)):
        yield


def next_token_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Returns the logits after each row's last token, in float32."""
    return _read_alone(model, batch, use_cache=False).logits.float()


def _read_alone(model: nn.Module, batch: Batch, *, use_cache: bool) -> Any:
    with last_position_only(model, batch.attention_mask):
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            use_cache=use_cache,
        )


def read_batch(
    model: nn.Module, batch: Batch, prefix_cache: Cache | None, *, use_cache: bool
) -> tuple[Float[Tensor, "batch vocab"], Cache | None]:
    """Returns the logits after each row, in float32, and the cache that the rows leave.

    Args:
        model: the model.
        batch: the rows.
        prefix_cache: what all of them go on from, which stays as it is; None for nothing.
        use_cache: whether a cache is wanted where nothing is gone on from; else it is None.
    """
    if prefix_cache is None:
        output = _read_alone(model, batch, use_cache=use_cache)
    else:
        output = _read_behind(model, prefix_cache, batch)
    return output.logits.float(), output.get(CACHE)


def by_context(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    token_lists: list[list[int]],
    token_budget: int,
    kept: dict[str, KeptContext] | None = None,
) -> Iterator[tuple[Cache | None, Batch]]:
    """Yields prompts in batches, each behind the cache of the context that they share.

    Prompts that share none come first, with None; so does a context of which nothing is shared in
    tokens.

    Args:
        decoder: the model that the batches are for, and that computes contexts.
        prompts: the prompts.
        token_lists: the tokens of each prompt, its context's among them.
        token_budget: padded tokens of a batch, and as many cached ones.
        kept: contexts computed earlier, by their text; those computed here join them.
    """
    for context, rows in _rows_by_context(prompts, keeps_all=kept is not None).items():
        tails = [token_lists[row] for row in rows]
        cache = None
        n_cached = 0
        if context:
            prefix = _prefix_of(decoder.model, context, tails, kept)
            if prefix is not None:
                cache = prefix.cache
                n_cached = len(prefix.tokens)
                tails = [tokens[n_cached:] for tokens in tails]
        for group in by_length(tails, token_budget, n_cached):
            group_tails = [tails[place] for place in group]
            group_rows = [rows[place] for place in group]
            yield cache, pad(group_tails, decoder.pad_id, group_rows).to(decoder.device)


def _rows_by_context(prompts: Sequence[Prompt], *, keeps_all: bool) -> dict[str, list[int]]:
    """Returns the prompts' places by the context to compute once; those under "" have none."""
    counts = Counter(prompt.context for prompt in prompts)
    rows_by_context: dict[str, list[int]] = {"": []}
    for row, prompt in enumerate(prompts):
        # A context that is kept for later calls is worth a pass for a single prompt too.
        is_shared = keeps_all or counts[prompt.context] > 1
        context = prompt.context if is_shared else ""
        rows_by_context.setdefault(context, []).append(row)
    return rows_by_context


def _prefix_of(
    model: nn.Module,
    context: str,
    token_lists: list[list[int]],
    kept: dict[str, KeptContext] | None,
) -> KeptContext | None:
    """Returns what prompts of one context begin with, in tokens; None if they share no token."""
    if kept is not None and context in kept:
        prefix = kept[context]
        # The context's last token may have merged with what followed it in earlier prompts.
        if all(prefix.begins(tokens) for tokens in token_lists):
            return prefix
    shared_tokens = token_lists[0][: _n_shared(token_lists)]
    if not shared_tokens:
        return None
    prefix = KeptContext(shared_tokens, run_prefix(model, shared_tokens))
    if kept is not None:
        kept[context] = prefix
    return prefix


def _n_shared(token_lists: list[list[int]]) -> int:
    """Returns how many tokens all lists begin with, of which every list keeps at least one."""
    n_shared = 0
    for column in zip(*token_lists, strict=False):
        if len(set(column)) > 1:
            break
        n_shared += 1
    shortest = min(len(tokens) for tokens in token_lists)
    return min(n_shared, shortest - 1)


def run_prefix(model: nn.Module, prefix: list[int]) -> Cache:
    """Returns the key-value cache of a prefix, batch of one."""
    input_ids = torch.tensor([prefix], device=device_of(model))
    # Nobody asks for the logits, so the head runs on one position alone.
    with last_position_only(model, torch.ones_like(input_ids, dtype=torch.bool)):
        return model(input_ids=input_ids, use_cache=True)[CACHE]


def after_prefix(
    model: nn.Module, prefix_cache: Cache, batch: Batch
) -> Float[Tensor, "batch vocab"]:
    """Returns the logits after each row, where all rows go on from one prefix."""
    return _read_behind(model, prefix_cache, batch).logits.float()


def _read_behind(model: nn.Module, prefix_cache: Cache, batch: Batch) -> Any:
    n_rows, n_new = batch.input_ids.shape
    device = batch.input_ids.device
    n_seen = prefix_cache.get_seq_length()
    # The pass appends to its cache, and the prefix is wanted again.
    cache = copy.deepcopy(prefix_cache)
    cache.batch_repeat_interleave(n_rows)
    is_seen = torch.ones(n_rows, n_seen, dtype=torch.bool, device=device)
    attention_mask = torch.cat([is_seen, batch.attention_mask], dim=1)
    positions = torch.arange(n_seen, n_seen + n_new, device=device)
    with last_position_only(model, batch.attention_mask):
        return model(
            input_ids=batch.input_ids,
            attention_mask=attention_mask.long(),
            position_ids=positions.expand(n_rows, -1),
            use_cache=True,
            **{CACHE: cache},
        )
