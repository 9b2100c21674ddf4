"""Cost: FLOP and numbers kept of a prompt's answer, ours and with demonstrations before it.

    matrices    2 * n_matrix * new tokens
    attention   4 * n_layers * query_width * new tokens * (tokens before + new tokens)
    head        2 * vocabulary * hidden_size
    routing     2 * n_routed * rank * (query_width + key_width) * new tokens       projections
                + 4 * n_routed * n_heads * rank * new tokens^2                     wider heads
                + 2 * router's weights + 2 * encoder's matrices * new tokens

A kept context is computed once and read by every prompt behind it: its tokens are before, and its
keys and values are kept, 2 * n_layers * key_width for each. Ours keeps the directions, which is
what the paper counts, and the router. All is computed from sizes, nothing is measured here; causal
masks halve no attention, as kernels may or may not skip it.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from icrouting.analysing.study import Study, demos_of
from icrouting.fitting.reckoning import Sizes
from icrouting.routing.encoder import load_encoder
from icrouting.routing.features import sentence_encoder
from icrouting.tasks.prompts import demonstration

N_DEMOS = (0, 1, 2, 5, 10, 20, 30, 40, 50)
ROUTED = "routed"
FEW_SHOT = "few-shot"
KEPT = "few-shot, context kept"


@dataclass(frozen=True)
class Routed:
    """The sizes of a router.

    Attributes:
        n_layers: routed layers.
        rank: directions of each.
        n_directions: numbers in all directions.
        n_router: its weights.
        n_encoder: weights of its sentence encoder's matrices; 0 where it has none.
    """

    n_layers: int
    rank: int
    n_directions: int
    n_router: int
    n_encoder: int


def prompt_flops(sizes: Sizes, n_new: float, n_before: float = 0) -> float:
    """Returns the FLOP of a prompt's answer, some of whose tokens were computed before."""
    matrices = 2 * sizes.n_matrix * n_new
    attention = 4 * sizes.n_layers * sizes.query_width * n_new * (n_before + n_new)
    return matrices + attention + 2 * sizes.vocab_size * sizes.hidden_size


def routing_flops(sizes: Sizes, routed: Routed, n_tokens: float) -> float:
    """Returns what routing adds to a prompt's FLOP."""
    widths = sizes.query_width + sizes.key_width
    projections = 2 * routed.n_layers * routed.rank * widths * n_tokens
    wider = 4 * routed.n_layers * sizes.n_heads * routed.rank * n_tokens**2
    return projections + wider + 2 * routed.n_router + 2 * routed.n_encoder * n_tokens


def cost(study: Study) -> dict[str, pd.DataFrame]:
    """Returns a table by prompt and number of demonstrations: tokens, FLOP and numbers kept.

    Lengths are means over these prompts and over demonstrations of their tasks, which weigh alike.
    `flop_ratio` is FLOP as a multiple of the zero-shot prompt's. "routed" has no demonstrations;
    its numbers kept are the directions, and `kept_with_router` counts the router as well.
    """
    sizes = Sizes.of(study.decoder.base)
    pids = study.icr.pids
    encoder = sentence_encoder(study.icr.description.fit.encoder)
    # A control of no features loads an encoder for its width alone.
    reads_text = encoder is not None and encoder == study.icr.description.fit.encoder
    routed = Routed(
        len(pids.layers),
        pids.rank,
        pids.query_pids.numel() + pids.key_pids.numel(),
        sum(weights.numel() for weights in study.icr.router.parameters()),
        load_encoder(encoder, "cpu").n_matrix if encoder and reads_text else 0,
    )
    n_query, n_demo = lengths(study)
    zero_shot = prompt_flops(sizes, n_query)
    n_router = routed.n_directions + routed.n_router
    own = {"prompt": ROUTED, "n_demos": 0, "tokens": n_query}
    own["flop"] = zero_shot + routing_flops(sizes, routed, n_query)
    lines = [{**own, "kept": routed.n_directions, "kept_with_router": n_router}]
    for n_demos in N_DEMOS:
        n_before = n_demos * n_demo
        line = {"n_demos": n_demos, "tokens": n_query + n_before}
        flop = prompt_flops(sizes, n_query + n_before)
        lines.append({"prompt": FEW_SHOT, **line, "flop": flop, "kept": 0, "kept_with_router": 0})
        flop = prompt_flops(sizes, n_query, n_before)
        n_kept = 2 * sizes.n_layers * sizes.key_width * n_before
        kept = {"kept": n_kept, "kept_with_router": n_kept}
        lines.append({"prompt": KEPT, **line, "flop": flop, **kept})
    table = pd.DataFrame(lines)
    table["flop_ratio"] = table.flop / zero_shot
    return {"cost": table}


def lengths(study: Study) -> tuple[float, float]:
    """Returns the mean number of tokens of a zero-shot prompt, and that of a demonstration."""
    queries = []
    demos = []
    for name, task in study.tasks.items():
        queries.append(np.mean([len(study.queries[row]) for row in study.rows_of(name)]))
        texts = [demonstration(task, row) for row in demos_of(task, study.icr, study.config.seed)]
        token_lists = study.decoder.tokenize(texts)
        demos.append(np.mean([len(tokens) for tokens in token_lists]))
    return float(np.mean(queries)), float(np.mean(demos))
