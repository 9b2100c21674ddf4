"""Training queries: prompts with their trunk states and features (stage 3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.batches import finite_rows, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.fitting.trunk import TrunkState, run_trunk
from icrouting.routing.features import Features, Scale
from icrouting.runtime.processes import mine, total
from icrouting.runtime.progress import track
from icrouting.tasks.task import Example, Task

# Queries whose features are computed at once.
READ_AT_ONCE = 64
# Validation rows of all tasks together: more of them cost time, fewer say nothing.
MOST_HELD = 100
FEWEST_HELD = 10
# The subfolder that keeps their trunk.
HELD = "validation"


@dataclass(frozen=True)
class Query:
    """One training query.

    Attributes:
        state: what the trunk left of its zero-shot prompt.
        features: E(x), what the router reads, [n_features].
        option_ids: first token of each option.
        label: place of the answer among the options.
        text: the prompt, to be named in errors.
    """

    state: TrunkState
    features: Tensor
    option_ids: list[int]
    label: int
    text: str = ""


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
    read = _read(decoder, examples, features, first_layer, config, folder)
    entropies = torch.tensor([state.entropy for state in read.states])
    is_finite = read.vectors.isfinite().all(1) & entropies.isfinite()
    finite = finite_rows(is_finite, read.texts, "states", config.skip_nan)
    if not finite:
        raise ValueError(
            "no training query has finite states: load the model in float32 or bfloat16"
        )
    # Training sees scaled features; the router is told the scale when it is trained.
    scale = features.scale(read.vectors[finite])
    return _queries(examples, read, finite, scale), scale


def held_queries(
    decoder: Decoder,
    tasks: Sequence[Task],
    features: Features,
    scale: Scale,
    first_layer: int,
    config: FitConfig,
    folder: Path | None = None,
) -> list[Query]:
    """Returns queries of the tasks' validation rows, which a training is judged on.

    At most 100 are drawn, as many of each task. There are none where the slices hold fewer than 10
    rows together: so few are learned from, and cross-validated on.

    Args:
        decoder: the model that is routed.
        tasks: the source tasks.
        features: what the router reads.
        scale: of the training queries' features.
        first_layer: the first routed layer.
        config: settings.
        folder: keeps the trunk's states, beside those of the training queries.
    """
    if not _can_validate(tasks):
        return []
    rng = np.random.default_rng(config.seed + 2)
    n_each = math.ceil(MOST_HELD / len(tasks))
    examples = []
    for task in tasks:
        order = rng.permutation(len(task.validation))
        examples += [(task, task.validation[index]) for index in order[:n_each]]
    # Apart from the training queries, whose states do not depend on what shares their batches.
    held_folder = None if folder is None else folder / HELD
    if held_folder is not None:
        held_folder.mkdir(exist_ok=True)
    read = _read(decoder, examples, features, first_layer, config, held_folder)
    finite = finite_rows(read.vectors.isfinite().all(1), read.texts, "states", config.skip_nan)
    return _queries(examples, read, finite, scale)


@dataclass(frozen=True)
class _Read:
    """What was read of examples, each list in their order.

    Attributes:
        texts: their prompts.
        options: the first tokens of their options.
        states: what the trunk left of them.
        vectors: the features of them, as they are.
    """

    texts: list[str]
    options: list[list[int]]
    states: list[TrunkState]
    vectors: Float[Tensor, "n_queries n_features"]


def _read(
    decoder: Decoder,
    examples: Sequence[tuple[Task, Example]],
    features: Features,
    first_layer: int,
    config: FitConfig,
    folder: Path | None,
) -> _Read:
    """Returns what the trunk and the features' reader make of examples."""
    texts = [task.prompt(example) for task, example in examples]
    options = []
    # Which tokens an option begins with depends on the text before it.
    for text, (task, example) in zip(texts, examples, strict=True):
        options.append(option_ids(decoder.tokenizer, text, task.options(example)))
    decoder.check_known(options)
    states = run_trunk(decoder, _shortened(decoder, texts, config), first_layer, folder)
    return _Read(texts, options, states, _vectors(features, states))


def _queries(
    examples: Sequence[tuple[Task, Example]], read: _Read, rows: Sequence[int], scale: Scale
) -> list[Query]:
    """Returns the queries of some rows, their features scaled."""
    mean, std = scale
    scaled = (read.vectors - mean) / std
    queries = []
    for row in rows:
        _, example = examples[row]
        queries.append(
            Query(read.states[row], scaled[row], read.options[row], example.label, read.texts[row])
        )
    return queries


def rows_to_learn_from(task: Task, tasks: Sequence[Task], config: FitConfig) -> Sequence[Example]:
    """Returns a task's training rows, and its validation slice where that is not validated on.

    Args:
        task: one of the source tasks.
        tasks: all of them.
        config: settings; without `min_steps` or `patience` the slice stays apart, as it is not
            asked for anything.
    """
    if config.min_steps and config.patience and not _can_validate(tasks):
        return (*task.train, *task.validation)
    return task.train


def _can_validate(tasks: Sequence[Task]) -> bool:
    return sum(len(task.validation) for task in tasks) >= FEWEST_HELD


def _drawn(tasks: Sequence[Task], config: FitConfig) -> list[tuple[Task, Example]]:
    """Returns the queries drawn from every task's training rows, each with its task."""
    # Not the seed itself, which draws the prompts of the extraction.
    rng = np.random.default_rng(config.seed + 1)
    examples = []
    for task in tasks:
        rows = rows_to_learn_from(task, tasks, config)
        order = rng.permutation(len(rows))
        for index in order[: config.n_queries]:
            examples.append((task, rows[index]))
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
