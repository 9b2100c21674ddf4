"""Attention: what routing moves beside what demonstrations move, on the same query tokens.

A zero-shot prompt's tokens end the few-shot prompt too. Each of these rows is compared with itself
in the zero-shot prompt, where demonstrations have no attention at all:

    moved by routing          total variation of two rows over the query's tokens
    moved by demonstrations   that over all tokens; what the demonstrations get counts as moved
    within the query          that of rows over the query's tokens alone, made to add up to 1

All passes run the model's own `eager` kernel, the one that hands out attention weights. Within the
query its first token is left out, since in a zero-shot prompt it takes what is looked at for want
of anything else, as the first token of any text does.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from icrouting.analysing.study import Study, with_interval
from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of
from icrouting.decoder.passes import next_token_logits
from icrouting.routing.attach import attach
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Routing
from icrouting.runtime.progress import track

FEWEST = 3


def attention_rows(
    decoder: Decoder,
    tokens: Sequence[int],
    n_rows: int,
    pids: PIDs | None = None,
    routing: Routing | None = None,
) -> Float[Tensor, "n_layers n_heads n_rows kv_len"]:
    """Returns the attention of a prompt's last rows in every layer, plain or routed.

    Args:
        decoder: the model, whose attention implementation is put back.
        tokens: the prompt.
        n_rows: how many of its last tokens.
        pids: the directions of a routing; None for none.
        routing: one row, or None.
    """
    base = decoder.base
    implementation = base.config._attn_implementation
    weights: list[Tensor] = []

    def keep(attention: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        weights.append(output[1][0, :, -n_rows:].float().cpu())

    batch = pad([tokens], decoder.pad_id).to(decoder.device)
    with ExitStack() as leaving:
        leaving.callback(base.set_attn_implementation, implementation or "eager")
        base.set_attn_implementation("eager")
        if pids is not None:
            attachment = leaving.enter_context(attach(decoder.model, pids))
            attachment.routing = routing
        for layer in range(decoder.dims.n_layers):
            hook = attention_of(decoder.model, layer).register_forward_hook(keep)
            leaving.enter_context(hook)
        with torch.no_grad():
            next_token_logits(decoder.model, batch)
    return torch.stack(weights)


def attention(study: Study) -> dict[str, pd.DataFrame]:
    """Returns a table by task and layer: how much attention moves, and whether alike.

    Shares in [0, 1], means over items, heads and the query's tokens: `routing`, `demonstrations`,
    `routing_within` and `demonstrations_within` (over the query's tokens alone), and
    `demonstrations_get`, what falls on the demonstrations. `alike` is the correlation of the two
    changes within the query, NaN where routing changes nothing; its interval is over items. `n`
    counts the items: one is left out whose tokens do not end its few-shot prompt, or are too few.

    Raises:
        ValueError: all of them are left out.
    """
    check_rows(study)
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    rows = range(len(study.items))
    for row in track(rows, "attention", [1] * len(rows), "prompts"):
        task = study.items[row].task
        for layer, figures in enumerate(_figures(study, row)):
            measured.setdefault((task, layer), []).append(figures)
    lines = []
    for (task, layer), figures in measured.items():
        frame = pd.DataFrame(figures)
        lines.append(
            {
                "task": task,
                "layer": layer,
                "is_routed": layer in study.layers,
                "n": len(figures),
                **frame.mean().to_dict(),
                **with_interval("alike", [frame.alike.to_numpy()]),
            }
        )
    return {"attention": pd.DataFrame(lines)}


def _figures(study: Study, row: int) -> list[dict[str, float]]:
    """The figures of an item, a dict a layer; none where its rows do not match."""
    query = study.queries[row]
    context = study.contexts[row]
    n_rows = _n_rows(query, context)
    if not n_rows:
        return []
    n_before = len(query) - n_rows
    routing = Routing(study.routing.routing_vector[[row]], study.routing.head_gates[[row]])
    plain = attention_rows(study.decoder, query, n_rows)
    routed = attention_rows(study.decoder, query, n_rows, study.icr.pids, routing)
    shown = attention_rows(study.decoder, context, n_rows)
    figures = []
    for layer in range(len(plain)):
        own_rows = [plain[layer], routed[layer], shown[layer]]
        figures.append(moved(*own_rows, n_before=n_before))
    return figures


def check_rows(study: Study) -> None:
    """Checks that some item's tokens end its few-shot prompt; ValueError where none's do."""
    pairs = zip(study.queries, study.contexts, strict=True)
    if not any(_n_rows(query, context) for query, context in pairs):
        raise ValueError(
            "no test prompt's tokens end its few-shot prompt's, so that attention cannot be held "
            "together: leave the part attention out"
        )


def _n_rows(query: Sequence[int], context: Sequence[int]) -> int:
    """How many tokens of a query are held against themselves in its few-shot prompt."""
    # A tokenizer may begin every text by a token of its own, which demonstrations stand behind.
    n_rows = n_shared_end(query, context)
    n_before = len(query) - n_rows
    is_alike = list(query[:n_before]) == list(context[:n_before])
    return n_rows if is_alike and n_rows >= FEWEST else 0


def n_shared_end(query: Sequence[int], context: Sequence[int]) -> int:
    """Returns how many tokens two prompts end with alike."""
    n = 0
    for one, other in zip(reversed(query), reversed(context), strict=False):
        if one != other:
            break
        n += 1
    return n


def moved(
    plain: Float[Tensor, "n_heads n_rows kv_len"],
    routed: Float[Tensor, "n_heads n_rows kv_len"],
    shown: Float[Tensor, "n_heads n_rows long_len"],
    n_before: int = 0,
) -> dict[str, float]:
    """Returns what of one layer's attention moved, means over heads and rows.

    Args:
        plain: of the zero-shot prompt.
        routed: of the same, routed.
        shown: of the same tokens behind demonstrations.
        n_before: tokens of the zero-shot prompt before its rows, which the few-shot prompt begins
            with as well.
    """
    n_rows = plain.shape[1]
    n_shown = shown.shape[2] - n_rows - n_before
    # The zero-shot prompt as the few-shot one would have it, with nothing on the demonstrations.
    apart = torch.cat(
        [plain[..., :n_before], plain.new_zeros(*plain.shape[:2], n_shown), plain[..., n_before:]],
        -1,
    )
    by_demonstrations = (shown - apart).abs().sum(-1) / 2
    by_routing = (routed - plain).abs().sum(-1) / 2
    # Rows and columns from the query's second token on.
    inner = [_within(each, n_rows - 1) for each in (plain, routed, shown)]
    routing_change = inner[1] - inner[0]
    shown_change = inner[2] - inner[0]
    return {
        "routing": float(by_routing.mean()),
        "demonstrations": float(by_demonstrations.mean()),
        "demonstrations_get": float(shown[..., n_before : n_before + n_shown].sum(-1).mean()),
        "routing_within": float(routing_change.abs().sum(-1).mean() / 2),
        "demonstrations_within": float(shown_change.abs().sum(-1).mean() / 2),
        "alike": _correlation(routing_change, shown_change),
    }


def _within(rows: Float[Tensor, "n_heads n_rows kv_len"], n: int) -> Tensor:
    """The last rows over the last columns, made to add up to 1; 0 where there is nothing."""
    inner = rows[:, -n:, -n:].double()
    whole = inner.sum(-1, keepdim=True)
    # A row whose window or sink leaves nothing here moves nothing either.
    return torch.where(whole > 0, inner / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of the entries that a causal row has, over heads and rows."""
    n = one.shape[-1]
    is_seen = torch.ones(n, n, dtype=torch.bool).tril().expand_as(one)
    a = one[is_seen].numpy()
    b = other[is_seen].numpy()
    if not a.any() or not b.any() or len(a) < 2:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
