"""Capture: the last token's queries and keys of every routed layer (section 2)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.config import Pooling
from icrouting.decoder.batches import finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of, dims_of, family_of
from icrouting.decoder.passes import after_prefix, by_context
from icrouting.decoder.sites import watched
from icrouting.fitting.pooling import pooled
from icrouting.tasks.prompts import Prompt

# Tokens of a batch, padded.
TOKEN_BUDGET = 4096

QueriesAndKeys = tuple[
    Float[Tensor, "n_layers batch query_width"], Float[Tensor, "n_layers batch key_width"]
]


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, every forward leaves each layer's queries and keys in the yielded dicts.

    One dict per layer of `layers`, with [batch, q_len, n_heads * head_dim] under "query" and
    [batch, q_len, n_kv_heads * head_dim] under "key", before rotary embedding.
    """
    family = family_of(model)
    dims = dims_of(model)
    with ExitStack() as stack:
        stores = []
        for layer in layers:
            store = watched(attention_of(model, layer), family, dims)
            stores.append(stack.enter_context(store))
        yield stores


@torch.no_grad()
def capture_last_tokens(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    skip_nan: bool = False,
    token_budget: int | None = None,
    pooling: Pooling = "last",
) -> Iterator[QueriesAndKeys]:
    """Yields the last token's queries and keys of a batch of prompts at a time.

    They are in float32, on the processor.
    Prompts are batched by length, so the order is not theirs. A context that several share is
    computed once.

    Args:
        decoder: what reads the prompts.
        prompts: what is read.
        layers: the routed layers.
        skip_nan: leave out a prompt whose queries or keys are not finite.
        token_budget: tokens of a batch, padded; None takes the decoder's.
        pooling: which other tokens count, see `FitConfig`; contexts are then run with each prompt,
            as the tokens may be theirs.

    Raises:
        ValueError: a prompt's queries or keys are not finite, and it is not to be left out.
    """
    token_lists = decoder.tokenize([prompt.text for prompt in prompts])
    budget = token_budget or decoder.token_budget or TOKEN_BUDGET
    if pooling != "last":
        prompts = [replace(prompt, context="", query=prompt.text) for prompt in prompts]
    with pooled(decoder, pooling) as weights_of, captured(decoder.model, layers) as stores:
        for cache, batch in by_context(decoder, prompts, token_lists, budget):
            if cache is not None:
                after_prefix(decoder.model, cache, batch)
            else:
                # The stack alone: the vocabulary head need not run.
                mask = batch.attention_mask.long()
                decoder.stack(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
            # On the processor, as layers may lie on several devices.
            last = batch.last.cpu()
            weights = weights_of(batch.attention_mask.cpu())
            query = _of([store["query"] for store in stores], last, weights)
            key = _of([store["key"] for store in stores], last, weights)
            is_finite = (query.isfinite().all(-1) & key.isfinite().all(-1)).all(0)
            texts = [prompts[row].query for row in batch.rows]
            finite = finite_rows(is_finite, texts, "queries or keys", skip_nan)
            yield query[:, finite], key[:, finite]


def _of(
    layer_outputs: Sequence[Float[Tensor, "batch q_len width"]],
    last: Int[Tensor, "batch"],
    weights: Float[Tensor, "batch q_len"] | None,
) -> Float[Tensor, "n_layers batch width"]:
    """Returns every layer's output at each row's last position, or its weighted mean.

    They are in float32, on the processor.
    """
    rows = torch.arange(len(last))
    if weights is None:
        return torch.stack([output[rows, last].float().cpu() for output in layer_outputs])
    means = []
    for output in layer_outputs:
        # Padding may hold what is not finite, which a weight of zero does not take away.
        is_counted = (weights > 0).to(output.device)[..., None]
        counted = output.float().masked_fill(~is_counted, 0.0)
        means.append((weights.to(output.device)[:, None] @ counted)[:, 0].cpu())
    return torch.stack(means)
