"""Training queries: prompts with their trunk states and features (stage 3)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from icrouting.config import FitConfig
from icrouting.decoder.batches import finite_rows, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.fitting.training import Query
from icrouting.fitting.trunk import run_trunk
from icrouting.routing.features import Features, Scale
from icrouting.runtime.processes import mine, total
from icrouting.runtime.progress import track
from icrouting.tasks.task import Task

READ_AT_ONCE = 64


def training_queries(
    decoder: Decoder,
    tasks: Sequence[Task],
    features: Features,
    first_layer: int,
    config: FitConfig,
    folder: Path | None = None,
) -> tuple[list[Query], Scale]:
    """Returns the training queries of all source tasks, trunk run and features computed, and those's scale.

    The trunk's states are kept in `folder`, mapped into memory; with None in a file without a name.
    """
    rng = np.random.default_rng(config.seed + 1)
    chosen = [
        (task, task.train[index])
        for task in tasks
        for index in rng.permutation(len(task.train))[: config.n_queries]
    ]
    texts = [task.prompt(row) for task, row in chosen]
    ids = [
        option_ids(decoder.tokenizer, text, task.options(row))
        for text, (task, row) in zip(texts, chosen, strict=True)
    ]
    limit = min(config.max_tokens, decoder.context_length or config.max_tokens)
    token_lists = [
        _tail(tokens, limit, decoder.tokenizer.bos_token_id)
        for tokens in tokenize(decoder.tokenizer, texts)
    ]
    states = run_trunk(decoder, token_lists, first_layer, folder)
    chunks = mine(range(0, len(states), READ_AT_ONCE))
    vectors = torch.zeros(len(states), features.n_features)
    for start in track(chunks, "features", [READ_AT_ONCE] * len(chunks), "queries"):
        chunk = slice(start, start + READ_AT_ONCE)
        read = [state.tokens for state in states[chunk]], [state.hidden for state in states[chunk]]
        vectors[chunk] = features.read(*read).cpu()
    vectors, entropies = total(vectors), torch.tensor([state.entropy for state in states])
    kept = finite_rows(
        vectors.isfinite().all(1) & entropies.isfinite(), texts, "states", config.skip_nan
    )
    if not kept:
        raise ValueError(
            "no training query has finite states: load the model in float32 or bfloat16"
        )
    mean, std = features.scale(vectors[kept])
    scaled = (vectors - mean) / std
    queries = [
        Query(states[row], scaled[row], ids[row], chosen[row][1].label, texts[row]) for row in kept
    ]
    return queries, (mean, std)


def _tail(tokens: list[int], limit: int, bos: object) -> list[int]:
    """The last `limit` tokens, behind the first one where that is the beginning-of-text token."""
    if len(tokens) <= limit:
        return tokens
    return (
        [tokens[0], *tokens[len(tokens) - limit + 1 :]]
        if tokens[0] == bos and limit > 1
        else tokens[-limit:]
    )
