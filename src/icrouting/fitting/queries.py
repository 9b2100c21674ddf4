"""Training queries: prompts with their trunk states and features (stage 3)."""

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
from icrouting.decoder.labels import Parting, partings
from icrouting.decoder.scoring import counted_tokens
from icrouting.fitting.rows import can_validate, n_held_each, rows_to_learn_from
from icrouting.fitting.trunk import TrunkState, run_trunk
from icrouting.routing.features import Features, Scale
from icrouting.runtime.processes import mine, total
from icrouting.runtime.progress import track
from icrouting.tasks.task import Example, Task

# Queries whose features are computed at once.
READ_AT_ONCE = 64
# The subfolder that keeps their trunk.
HELD = "validation"


@dataclass(frozen=True)
class Query:
    """One training query: an example's prompt or, where a task scores whole labels, one place more.

    Attributes:
        state: what the trunk left of its zero-shot prompt, perhaps with an answer's beginning.
        features: E(x), what the router reads of the prompt, [n_features].
        option_ids: the tokens with which an option begins, or goes on from there.
        label: place of the answer's among them.
        text: the prompt, to be named in errors.
        task: the name of its task.
        row: number of the example that it is of, among all of its fit.
        answer: the example's label, an index into the task's options.
        n_answer: tokens of the answer's beginning behind the prompt.
    """

    state: TrunkState
    features: Tensor
    option_ids: list[int]
    label: int
    text: str = ""
    task: str = ""
    row: int = 0
    answer: int = 0
    n_answer: int = 0


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

    At most 100 are drawn, as many of each task that has any. There are none where the slices hold
    fewer than 10 rows together: so few are learned from, and cross-validated on.

    Args:
        decoder: the model that is routed.
        tasks: the source tasks.
        features: what the router reads.
        scale: of the training queries' features.
        first_layer: the first routed layer.
        config: settings.
        folder: keeps the trunk's states, beside those of the training queries.
    """
    if not can_validate(tasks):
        return []
    rng = np.random.default_rng(config.seed + 2)
    examples = []
    for task in tasks:
        order = rng.permutation(len(task.validation))
        examples += [(task, task.validation[index]) for index in order[: n_held_each(tasks)]]
    # Apart from the training queries, whose states do not depend on what shares their batches.
    held_folder = None if folder is None else folder / HELD
    if held_folder is not None:
        held_folder.mkdir(exist_ok=True)
    read = _read(decoder, examples, features, first_layer, config, held_folder)
    finite = finite_rows(read.vectors.isfinite().all(1), read.texts, "states", config.skip_nan)
    return _queries(examples, read, finite, scale)


@dataclass(frozen=True)
class _Read:
    """What was read of examples, an entry for each place where their answers part from others.

    Attributes:
        rows: the example that each place is of.
        texts: their prompts.
        places: the places.
        states: what the trunk left of prompt and answer up to there.
        vectors: the features of the prompts, as they are.
    """

    rows: list[int]
    texts: list[str]
    places: list[Parting]
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
    rows: list[int] = []
    texts: list[str] = []
    places: list[Parting] = []
    # Which tokens an option begins with depends on the text before it.
    for row, (task, example) in enumerate(examples):
        text = task.prompt(example)
        answers = counted_tokens(
            decoder.tokenizer, text, task.options(example), task.spec.label_scoring, task.joint
        )
        decoder.check_known(answers)
        parted = partings(answers, example.label)
        rows += [row] * len(parted)
        texts += [text] * len(parted)
        places += parted
    beginnings = [parting.beginning for parting in places]
    token_lists = _shortened(decoder, texts, beginnings, config)
    states = run_trunk(decoder, token_lists, first_layer, folder)
    vectors = _vectors(features, states, [len(tokens) for tokens in beginnings])
    return _Read(rows, texts, places, states, vectors)


def _queries(
    examples: Sequence[tuple[Task, Example]], read: _Read, kept: Sequence[int], scale: Scale
) -> list[Query]:
    """Returns the queries of those entries that are kept, their features scaled."""
    mean, std = scale
    scaled = (read.vectors - mean) / std
    queries = []
    for entry in kept:
        parting = read.places[entry]
        task, example = examples[read.rows[entry]]
        query = Query(
            read.states[entry],
            scaled[entry],
            parting.following,
            parting.chosen,
            read.texts[entry],
            task=task.name,
            row=read.rows[entry],
            answer=example.label,
            n_answer=len(parting.beginning),
        )
        queries.append(query)
    return queries


def n_rows_of(queries: Sequence[Query]) -> int:
    """Returns how many examples queries are of: one has several where whole labels are scored."""
    return len({query.row for query in queries})


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
