"""Passes: the same prompts under many routings, run from the first routed layer on.

What lies below the first routed layer does not depend on the routing, so that it runs once. Every
routing meets the prompts in the same batches: what two routings do differs by them alone, and two
that do the same give the same numbers, to the last digit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import Batch, by_length, finite_rows, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import late_entry, watch_entering
from icrouting.decoder.passes import TOKEN_BUDGET, by_context, next_token_logits, read_batch
from icrouting.fitting.capture import captured
from icrouting.routing.attach import attach
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Routing
from icrouting.tasks.prompts import Prompt

# From a routing with a row for each prompt, log-probabilities of the next token.
RoutedPass = Callable[[Routing], Float[Tensor, "n_prompts vocab"]]


@dataclass(frozen=True, eq=False)
class Traces:
    """What prompts leave, each behind the context that it shares with others.

    Attributes:
        log_probs: of the token after each prompt, in float64.
        queries: the last token's queries in some layers, before rotary embedding, in float32.
    """

    log_probs: Float[Tensor, "n_prompts vocab"]
    queries: Float[Tensor, "n_prompts n_layers query_width"]


def traces_of(decoder: Decoder, prompts: Sequence[Prompt], layers: Sequence[int]) -> Traces:
    """Returns what the model itself does with prompts; contexts that several share run once."""
    token_lists = decoder.tokenize([prompt.text for prompt in prompts])
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    queries: list[Tensor] = [torch.empty(0)] * len(prompts)
    budget = decoder.token_budget or TOKEN_BUDGET
    with torch.no_grad(), captured(decoder.model, layers) as stores:
        for cache, batch in by_context(decoder, prompts, token_lists, budget):
            logits, _ = read_batch(decoder.model, batch, cache, use_cache=False)
            _put(rows, batch, logits)
            places = torch.arange(len(batch.rows))
            last = batch.last.cpu()
            by_layer = [store["query"].cpu()[places, last].float() for store in stores]
            for place, row in enumerate(batch.rows):
                queries[row] = torch.stack([layer[place] for layer in by_layer])
    return Traces(_log_probs(rows), torch.stack(queries))


@contextmanager
def routed_passes(
    decoder: Decoder, pids: PIDs, token_lists: Sequence[Sequence[int]]
) -> Iterator[tuple[Float[Tensor, "n_prompts vocab"], RoutedPass]]:
    """Inside, prompts can be run under any routing.

    What is yielded are the model's own log-probabilities of the token after each prompt, in
    float64, and a function that returns those under a routing.
    """
    first = pids.layers[0]
    batches = list(_batches(decoder, token_lists))
    plain: list[Tensor] = [torch.empty(0)] * len(token_lists)
    states: list[Tensor] = []
    with torch.no_grad(), watch_entering(decoder.model, first, stop=False) as entered:
        for batch in batches:
            _put(plain, batch, next_token_logits(decoder.model, batch))
            states.append(entered.pop())
    with attach(decoder.model, pids) as attachment, late_entry(decoder.model, first) as entry:

        def run(routing: Routing) -> Tensor:
            rows: list[Tensor] = [torch.empty(0)] * len(token_lists)
            with torch.no_grad():
                for batch, hidden in zip(batches, states, strict=True):
                    attachment.routing = Routing(
                        routing.routing_vector[batch.rows], routing.head_gates[batch.rows]
                    )
                    _put(rows, batch, entry(batch, hidden))
            return _log_probs(rows)

        yield _log_probs(plain), run


def _batches(decoder: Decoder, token_lists: Sequence[Sequence[int]]) -> Iterator[Batch]:
    for group in by_length(token_lists, decoder.token_budget or TOKEN_BUDGET):
        group_lists = [token_lists[row] for row in group]
        yield pad(group_lists, decoder.pad_id, group).to(decoder.device)


def _put(rows: list[Tensor], batch: Batch, logits: Float[Tensor, "batch vocab"]) -> None:
    for row, row_logits in zip(batch.rows, logits.cpu(), strict=True):
        rows[row] = row_logits


def _log_probs(rows: Sequence[Tensor]) -> Float[Tensor, "n_prompts vocab"]:
    log_probs = torch.stack(list(rows)).double().log_softmax(-1)
    # A model may rule a token out by -inf.
    is_finite = ~log_probs.isnan().any(1)
    names = [f"prompt {row}" for row in range(len(rows))]
    finite_rows(is_finite, names, "next-token logits", skip=None)
    return log_probs


def kl(
    log_probs: Float[Tensor, "n_prompts n"], other: Float[Tensor, "n_prompts n"]
) -> Float[Tensor, "n_prompts"]:
    """Returns KL(p || q) = sum p (log p - log q) of each row, in nats."""
    probabilities = log_probs.exp()
    terms = probabilities * (log_probs - other)
    # What p rules out adds nothing, whatever q says of it.
    return terms.masked_fill(probabilities == 0, 0).sum(-1).clamp_min(0)
