"""Capture: the last token's queries and keys of every routed layer, prompt by prompt (section 2)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.batches import by_length, context_length, pad, pad_id_of, tokenize
from icrouting.families import attention_of, decoder_of, device_of, dims_of, family_of
from icrouting.progress import track
from icrouting.sites import hook_site

TOKEN_BUDGET = 4096


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, every forward leaves each layer's "query" and "key" projections in the yielded dicts.

    One dict per layer of `layers`, with [batch, q_len, n_heads * head_dim] under "query" and
    [batch, q_len, n_kv_heads * head_dim] under "key", before rotary embedding.
    """
    family, dims = family_of(model), dims_of(model)
    stores: list[dict[str, Tensor]] = [{} for _ in layers]
    with ExitStack() as stack:
        for layer, store in zip(layers, stores, strict=True):
            attention = attention_of(model, layer)
            for name, site in (("query", family.query), ("key", family.key)):
                stack.callback(hook_site(attention, site, dims, store, name).remove)
        yield stores


@torch.no_grad()
def capture_last_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    n_done: int = 0,
    token_budget: int = TOKEN_BUDGET,
) -> Iterator[tuple[Float[Tensor, "n_layers batch query_width"], Float[Tensor, "n_layers batch key_width"]]]:
    """Yields the last token's queries and keys of a batch of prompts at a time, in float32.

    The vocabulary head does not run. Prompts are batched by length, so the order is not that of `texts`; whole
    batches of the `n_done` prompts that an earlier run went through are left out.
    """
    token_lists = tokenize(tokenizer, texts, context_length(model))
    decoder, device = decoder_of(model), device_of(model)
    groups, n_skipped = list(by_length(token_lists, token_budget)), 0
    while n_skipped < n_done:
        n_skipped += len(groups.pop(0))
    with captured(model, layers) as stores:
        for group in track(groups, "extraction", [len(group) for group in groups], "prompts", n_done):
            batch = pad([token_lists[i] for i in group], pad_id_of(tokenizer)).to(device)
            decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
            rows, last = torch.arange(len(group)), batch.last.cpu()  # layers may lie on several devices
            yield tuple(  # pyright: ignore[reportReturnType]
                torch.stack([store[name][rows, last].float().cpu() for store in stores]) for name in ("query", "key")
            )
