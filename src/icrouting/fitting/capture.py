"""Capture: the last token's queries and keys of every routed layer, prompt by prompt (section 2)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.decoder.batches import finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of, dims_of, family_of
from icrouting.decoder.passes import after_prefix, by_context
from icrouting.decoder.sites import watched
from icrouting.tasks.prompts import Prompt

TOKEN_BUDGET = 4096


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, every forward leaves each layer's "query" and "key" projections in the yielded dicts.

    One dict per layer of `layers`, with [batch, q_len, n_heads * head_dim] under "query" and
    [batch, q_len, n_kv_heads * head_dim] under "key", before rotary embedding.
    """
    family, dims = family_of(model), dims_of(model)
    with ExitStack() as stack:
        yield [
            stack.enter_context(watched(attention_of(model, layer), family, dims))
            for layer in layers
        ]


@torch.no_grad()
def capture_last_tokens(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    skip_nan: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> Iterator[
    tuple[Float[Tensor, "n_layers batch query_width"], Float[Tensor, "n_layers batch key_width"]]
]:
    """Yields the last token's queries and keys of a batch of prompts at a time, in float32.

    Prompts are batched by length, so the order is not theirs. A context that several share is computed once. ValueError
    where a prompt's queries or keys are not finite, and `skip_nan` does not say to leave it out.
    """
    token_lists = decoder.tokenize([prompt.text for prompt in prompts])
    with captured(decoder.model, layers) as stores:
        for cache, batch in by_context(decoder, prompts, token_lists, token_budget):
            if cache is not None:
                after_prefix(decoder.model, cache, batch)
            else:  # the vocabulary head need not run
                mask = batch.attention_mask.long()
                decoder.stack(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
            places = (
                torch.arange(len(batch.rows)),
                batch.last.cpu(),
            )  # layers may lie on several devices
            query, key = (
                torch.stack([store[name][places].float().cpu() for store in stores])
                for name in ("query", "key")
            )
            finite = (query.isfinite().all(-1) & key.isfinite().all(-1)).all(0)
            rows_kept = finite_rows(
                finite, [prompts[row].query for row in batch.rows], "queries or keys", skip_nan
            )
            yield query[:, rows_kept], key[:, rows_kept]
