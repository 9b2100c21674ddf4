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
from icrouting.decoder.labels import Parting, partings
from icrouting.decoder.scoring import counted_tokens
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

    Their trunk is run and their features are computed, (features - mean) / std. Where a task scores
    whole labels, a row is a query more for every further place where its answer parts from other
    options: what is routed are the prompt and the answer up to there, by the prompt alone.

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
    texts: list[str] = []
    task_names: list[str] = []
    places: list[Parting] = []
    # Which tokens an option begins with depends on the text before it.
    for task, example in examples:
        text = task.prompt(example)
        answers = counted_tokens(
            decoder.tokenizer, text, task.options(example), task.spec.label_scoring, task.joint
        )
        decoder.check_known(answers)
        parted = partings(answers, example.label)
        texts += [text] * len(parted)
        task_names += [task.name] * len(parted)
        places += parted
    beginnings = [parting.beginning for parting in places]
    token_lists = _shortened(decoder, texts, beginnings, config)
    states = run_trunk(decoder, token_lists, first_layer, folder)
    vectors = _vectors(features, states, [len(tokens) for tokens in beginnings])
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
        parting = places[row]
        query = Query(
            states[row],
            scaled[row],
            parting.following,
            parting.chosen,
            texts[row],
            task=task_names[row],
            n_answer=len(parting.beginning),
        )
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


def _shortened(
    decoder: Decoder,
    texts: Sequence[str],
    beginnings: Sequence[Sequence[int]],
    config: FitConfig,
) -> list[list[int]]:
    """Returns the tokens of texts and of the answers behind them; long texts lose their start."""
    limit = min(config.max_tokens, decoder.context_length or config.max_tokens)
    bos = decoder.tokenizer.bos_token_id
    token_lists = tokenize(decoder.tokenizer, texts)
    decoder.check_known(token_lists)
    shortened = []
    for tokens, beginning in zip(token_lists, beginnings, strict=True):
        shortened.append([*_tail(tokens, limit - len(beginning), bos), *beginning])
    return shortened


def _tail(tokens: list[int], limit: int, bos: object) -> list[int]:
    """Returns `limit` tokens: the last ones, behind the beginning-of-text token if there is one."""
    if len(tokens) <= limit:
        return tokens
    if tokens[0] == bos and limit > 1:
        n_last = limit - 1
        return [tokens[0], *tokens[-n_last:]]
    return tokens[-limit:]


def _vectors(
    features: Features, states: Sequence[TrunkState], n_answer_tokens: Sequence[int]
) -> Float[Tensor, "n_queries n_features"]:
    """Returns the features of all queries' prompts, of which every process computes a share.

    The last `n_answer_tokens` of a query are no part of its prompt.
    """
    starts = mine(range(0, len(states), READ_AT_ONCE))
    sizes = [READ_AT_ONCE] * len(starts)
    # Zero where another process computes, so that the sum over the processes is the whole.
    vectors = torch.zeros(len(states), features.n_features)
    for start in track(starts, "features", sizes, "queries"):
        rows = slice(start, start + READ_AT_ONCE)
        tokens = []
        hidden = []
        for state, n_tokens in zip(states[rows], n_answer_tokens[rows], strict=True):
            n_prompt = len(state.tokens) - n_tokens
            tokens.append(state.tokens[:n_prompt])
            hidden.append(state.hidden[:n_prompt])
        vectors[rows] = features.read(tokens, hidden).cpu()
    return total(vectors)
