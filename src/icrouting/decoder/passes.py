"""Passes: next-token logits of padded batches, behind contexts that are computed once."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, base_of, device_of
from icrouting.tasks.prompts import Prompt

TOKEN_BUDGET = 2048  # a prompt of more than half of it runs alone, and so without a mask


@dataclass(frozen=True)
class KeptContext:
    """The tokens that prompts begin with, and the key-value cache that they leave, batch of one."""

    tokens: list[int]
    cache: Cache

    @property
    def n_numbers(self) -> int:
        """Keys and values held, over all layers."""
        held = [
            getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")
        ]
        return sum(tensor.numel() for tensor in held if tensor is not None)


@contextmanager
def last_position_only(
    model: PreTrainedModel, attention_mask: Bool[Tensor, "batch q_len"]
) -> Iterator[None]:
    """Inside, the model's `logits` are those of each row's last attended position, [batch, vocab].

    A hook hands the vocabulary head a contiguous [batch, hidden_size] tensor. `logits_to_keep=1` would take
    the last column, which is padding in most rows, and make the matmul copy the whole head once per row.
    """
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * position).argmax(1)

    def gather(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)],)

    head = base_of(model).get_output_embeddings()
    assert head is not None, "a causal language model has a vocabulary head"
    with head.register_forward_pre_hook(gather):
        yield


def next_token_logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Returns the logits after each row's last token, in float32."""
    with last_position_only(model, batch.attention_mask):
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        )
    return output.logits.float()


def by_context(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    token_lists: list[list[int]],
    token_budget: int,
    kept: dict[str, KeptContext] | None = None,
) -> Iterator[tuple[Cache | None, Batch]]:
    """Yields prompts in batches, each behind the cache of the context that they share: the kept one, or a new one.

    Prompts that share none come first, with None; so does a context of which nothing is shared in tokens.
    """
    counts, contexts = Counter(prompt.context for prompt in prompts), {"": []}
    for row, prompt in enumerate(prompts):
        is_shared = kept is not None or counts[prompt.context] > 1
        contexts.setdefault(prompt.context if is_shared else "", []).append(row)
    for context, rows in contexts.items():
        before = (
            _context_of(decoder.model, context, [token_lists[row] for row in rows], kept)
            if context
            else None
        )
        n_cached, cache = (len(before.tokens), before.cache) if before else (0, None)
        tails = [token_lists[row][n_cached:] for row in rows]
        for group in by_length(tails, token_budget, n_cached):
            batch = pad([tails[i] for i in group], decoder.pad_id, [rows[i] for i in group])
            yield cache, batch.to(decoder.device)


def _context_of(
    model: PreTrainedModel,
    context: str,
    token_lists: list[list[int]],
    kept: dict[str, KeptContext] | None,
) -> KeptContext | None:
    found = kept.get(context) if kept is not None else None
    if found and all(
        t[: len(found.tokens)] == found.tokens and len(t) > len(found.tokens) for t in token_lists
    ):
        return found
    n_shared = sum(
        1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*token_lists, strict=False))
    )
    # every list keeps at least one token
    if prefix := token_lists[0][: min(n_shared, *(len(tokens) - 1 for tokens in token_lists))]:
        found = KeptContext(prefix, run_prefix(model, prefix))
        if kept is not None:
            kept[context] = found
        return found
    return None


def run_prefix(model: PreTrainedModel, prefix: list[int]) -> Cache:
    """Returns the key-value cache of a prefix, batch of one."""
    input_ids = torch.tensor([prefix], device=device_of(model))
    with last_position_only(model, torch.ones_like(input_ids, dtype=torch.bool)):
        return model(input_ids=input_ids, use_cache=True)[CACHE]


def after_prefix(
    model: PreTrainedModel, prefix_cache: Cache, batch: Batch
) -> Float[Tensor, "batch vocab"]:
    """Returns the logits after each row, where all rows go on from one prefix."""
    n_rows, n_new = batch.input_ids.shape
    n_seen, device = prefix_cache.get_seq_length(), batch.input_ids.device
    cache = copy.deepcopy(prefix_cache)
    cache.batch_repeat_interleave(n_rows)
    seen = torch.ones(n_rows, n_seen, dtype=torch.bool, device=device)
    with last_position_only(model, batch.attention_mask):
        output = model(
            input_ids=batch.input_ids,
            attention_mask=torch.cat([seen, batch.attention_mask], dim=1).long(),
            position_ids=torch.arange(n_seen, n_seen + n_new, device=device).expand(n_rows, -1),
            use_cache=True,
            **{CACHE: cache},
        )
    return output.logits.float()
