"""Training queries: prompts with their trunk states and features (stage 3)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.batches import finite_rows, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.fitting.training import Query
from icrouting.fitting.trunk import TrunkState, run_trunk
from icrouting.routing.features import Features, Scale
from icrouting.runtime.processes import mine, total
from icrouting.runtime.progress import track
from icrouting.tasks.task import Example, Task

# Queries whose features are computed at once.
READ_AT_ONCE = 64


def training_queries(
    decoder: Decoder,
    tasks: Sequence[Task],
    features: Features,
    first_layer: int,
    config: FitConfig,
    folder: Path | None = None,
) -> tuple[list[Query], Scale]:
    """Returns the training queries of all source tasks, and the scale of their features.

    Their trunk is run and their features are computed, (features - mean) / std.

    Args:
        decoder: the model that is routed.
        tasks: the source tasks.
        features: what the router reads.
        first_layer: the first routed layer.
        config: settings.
        folder: keeps the trunk's states, mapped into memory; None keeps them in a file without a
            name.

    Raises:
        ValueError: the states of a query, or with `skip_nan` of all queries, are not finite.
    """
    examples = _drawn(tasks, config)
    texts = [task.prompt(example) for task, example in examples]
    options = []
    # Which tokens an option begins with depends on the text before it.
    for text, (task, example) in zip(texts, examples, strict=True):
        options.append(option_ids(decoder.tokenizer, text, task.options(example)))
    decoder.check_known(options)
    states = run_trunk(decoder, _shortened(decoder, texts, config), first_layer, folder)
    vectors = _vectors(features, states)
    entropies = torch.tensor([state.entropy for state in states])
    is_finite = vectors.isfinite().all(1) & entropies.isfinite()
    finite = finite_rows(is_finite, texts, "states", config.skip_nan)
    if not finite:
        raise ValueError(
            "no training query has finite states: load the model in float32 or bfloat16"
        )
    # Training sees scaled features; the router is told the scale when it is trained.
    mean, std = features.scale(vectors[finite])
    scaled = (vectors - mean) / std
    queries = []
    for row in finite:
        task, example = examples[row]
        query = Query(states[row], scaled[row], options[row], example.label, texts[row], task.name)
        queries.append(query)
    return queries, (mean, std)


def _drawn(tasks: Sequence[Task], config: FitConfig) -> list[tuple[Task, Example]]:
    """Returns the queries drawn from every task's training rows, each with its task."""
    # Not the seed itself, which draws the prompts of the extraction.
    rng = np.random.default_rng(config.seed + 1)
    examples = []
    for task in tasks:
        order = rng.permutation(len(task.train))
        for index in order[: config.n_queries]:
            examples.append((task, task.train[index]))
    return examples


def _shortened(decoder: Decoder, texts: Sequence[str], config: FitConfig) -> list[list[int]]:
    """Returns the tokens of texts; long ones lose their beginning."""
    limit = min(config.max_tokens, decoder.context_length or config.max_tokens)
    bos = decoder.tokenizer.bos_token_id
    token_lists = tokenize(decoder.tokenizer, texts)
    decoder.check_known(token_lists)
    return [_tail(tokens, limit, bos) for tokens in token_lists]


def _tail(tokens: list[int], limit: int, bos: object) -> list[int]:
    """Returns `limit` tokens: the last ones, behind the beginning-of-text token if there is one."""
    if len(tokens) <= limit:
        return tokens
    if tokens[0] == bos and limit > 1:
        n_last = limit - 1
        return [tokens[0], *tokens[-n_last:]]
    return tokens[-limit:]


def _vectors(
    features: Features, states: Sequence[TrunkState]
) -> Float[Tensor, "n_queries n_features"]:
    """Returns the features of all queries, of which every process computes a share."""
    starts = mine(range(0, len(states), READ_AT_ONCE))
    sizes = [READ_AT_ONCE] * len(starts)
    # Zero where another process computes, so that the sum over the processes is the whole.
    vectors = torch.zeros(len(states), features.n_features)
    for start in track(starts, "features", sizes, "queries"):
        rows = slice(start, start + READ_AT_ONCE)
        tokens = [state.tokens for state in states[rows]]
        hidden = [state.hidden for state in states[rows]]
        vectors[rows] = features.read(tokens, hidden).cpu()
    return total(vectors)
