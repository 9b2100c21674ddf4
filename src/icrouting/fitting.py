"""The stages of a fit, each of which can be taken up again from what an earlier run kept in its folder."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.capture import capture_last_tokens
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.batches import context_length, finite_rows, pad_id_of, tokenize
from icrouting.decoder.families import device_of, dims_of, family_of
from icrouting.decoder.hold import check_alone, frozen
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.scoring import option_ids
from icrouting.routing.features import Features, Scale, features_of
from icrouting.routing.pids import PIDs, QKMoments, check_layers, fit_pids, late_third
from icrouting.routing.router import Router
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import agree, decided, first_one_first, here, mine, total
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks.prompts import extraction_prompts
from icrouting.tasks.task import Task, rows_digest
from icrouting.train import Query, Trainer
from icrouting.trunk import run_trunk

SAVE_EVERY_SECONDS = 20.0
READ_AT_ONCE = 64
BLOCK = 32  # prompts; what a process takes at a time, and batches by length
HELD = 64  # batches; the moments of a wide model are gigabytes, and slower to add to than a batch is to run


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: FitConfig,
    folder: Path | None = None,
    kind: type[Router] = Router,
) -> tuple[PIDs, Router, Features]:
    """Returns the PIDs, a router of a kind trained on them, and the features that it reads (stages 1 to 3).

    ValueError where the model cannot be routed, or the settings, tasks or folder do not fit.
    """
    if not tasks:
        raise ValueError("a fit needs at least one source task, got none")
    check_alone(model, "icr")
    family_of(model)
    dims, device = dims_of(model), device_of(model)
    layers = check_layers(config.layers or late_third(dims.n_layers), dims.n_layers)
    if config.encoder == HIDDEN and layers[0] == 0:
        raise ValueError("what enters layer 0 has read the last token alone: with hidden states, route from layer 1 up")
    with claimed(folder, config, tasks, fingerprint(model)):
        features = features_of(config.encoder, model, tokenizer, str(device))
        generator = torch.Generator().manual_seed(config.seed)
        router = kind(features.n_features, len(layers), dims.n_heads, config.rank, config.hidden_width, generator)
        router.to(device)
        with frozen(model):
            pids = router.adopt(extract(model, tokenizer, tasks, layers, config, folder))
            queries, scale = training_queries(model, tokenizer, tasks, features, layers[0], config, folder)
            Trainer(model, pids, router, queries, config, pad_id_of(tokenizer), folder).run()
    router.absorb(*scale)
    return pids, router.eval().requires_grad_(False), features


@contextmanager
def claimed(folder: Path | None, config: FitConfig, tasks: Sequence[Task], fingerprint: str) -> Iterator[None]:
    """Inside, a folder is one fit's alone, made or taken up where it was left, and the same fit for all processes.

    ValueError names what differs, where the folder holds another fit or the processes were given different ones.
    """
    settings = {**dataclasses.asdict(config), "tasks": [task.name for task in tasks]}
    settings = json.loads(json.dumps({**settings, "model": fingerprint, "rows": rows_digest(tasks)}))
    agree(**settings)
    if folder is None:
        yield
        return
    with locked(folder):
        with first_one_first():
            file = folder / "fit.json"
            if not file.exists():  # so for the first process alone: others would write over each other
                save_json(file, settings)
            found = load_json(file)
            if different := [key for key in settings if found.get(key) != settings[key]]:
                changes = ", ".join(f"{key} was {found.get(key)!r}, is {settings[key]!r}" for key in different)
                raise ValueError(f"{folder} holds a fit with other settings ({changes}): choose another folder")
        yield


def extract(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    folder: Path | None,
) -> PIDs:
    """Returns the PIDs of few-shot prompts of all source tasks, pooled (stages 1 and 2).

    Processes take blocks of prompts in turn. What all of them saw is kept at the end of a round, so that any number
    of processes can go on from there; the memory taken does not depend on the number of prompts.
    """
    rng, shape = np.random.default_rng(config.seed), (config.n_prompts, config.demos_per_class)
    prompts = (p for task in tasks for p in extraction_prompts(task, *shape, rng, config.queries_per_context))
    n_prompts = sum(min(config.n_prompts, len(task.train)) for task in tasks)
    dims, place, n_done = dims_of(model), here(), 0
    moments = QKMoments(len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    kept = folder / "moments.safetensors" if folder else None
    if kept is not None and kept.exists():
        tensors, metadata = load_tensors(kept)
        n_done = int(metadata["n_done"])
        moments = QKMoments.from_tensors(tensors) if place.is_main_process else moments
    due, blocks, held = time.monotonic() + SAVE_EVERY_SECONDS, list(range(n_done, n_prompts, BLOCK)), []
    sizes = [min(BLOCK, n_prompts - start) for start in blocks]
    deque(islice(prompts, n_done), maxlen=0)
    for number, start in enumerate(track(blocks, "extraction", sizes, "prompts", n_done)):
        block, turn = list(islice(prompts, BLOCK)), number % place.num_processes
        if turn == place.process_index:
            held += capture_last_tokens(model, tokenizer, block, layers, skip_nan=config.skip_nan)
        is_last = start == blocks[-1]
        is_due = turn == place.num_processes - 1 and decided(time.monotonic() > due)
        if held and (is_due or is_last or len(held) >= HELD):
            moments.update(*(torch.cat(side, dim=1) for side in zip(*held, strict=True)))
            held.clear()
        if kept is not None and (is_due or is_last):
            begun, whole = time.monotonic(), _summed(moments)
            if place.is_main_process:
                save_tensors(kept, whole, {"n_done": str(start + len(block))})
            # Moments of a wide model are gigabytes: writing them takes a twentieth of the time at most.
            due = time.monotonic() + max(SAVE_EVERY_SECONDS, 20 * (time.monotonic() - begun))
    moments = QKMoments.from_tensors(_summed(moments))
    return fit_pids(moments, layers, config.rank, config.basis, torch.Generator().manual_seed(config.seed))


def _summed(moments: QKMoments) -> dict[str, Tensor]:
    """What all processes saw; by name, since one that was read from a file has its tensors in another order."""
    tensors = moments.tensors()
    return {name: total(tensors[name]) for name in sorted(tensors)}


def training_queries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
        (task, task.train[index]) for task in tasks for index in rng.permutation(len(task.train))[: config.n_queries]
    ]
    texts = [task.prompt(row) for task, row in chosen]
    ids = [option_ids(tokenizer, text, task.options(row)) for text, (task, row) in zip(texts, chosen, strict=True)]
    limit = min(config.max_tokens, context_length(model) or config.max_tokens)
    token_lists = [_tail(tokens, limit, tokenizer.bos_token_id) for tokens in tokenize(tokenizer, texts)]
    states = run_trunk(model, token_lists, first_layer, pad_id_of(tokenizer), folder)
    chunks = mine(range(0, len(states), READ_AT_ONCE))
    vectors = torch.zeros(len(states), features.n_features)
    for start in track(chunks, "features", [READ_AT_ONCE] * len(chunks), "queries"):
        chunk = slice(start, start + READ_AT_ONCE)
        read = [state.tokens for state in states[chunk]], [state.hidden for state in states[chunk]]
        vectors[chunk] = features.read(*read).cpu()
    vectors, entropies = total(vectors), torch.tensor([state.entropy for state in states])
    kept = finite_rows(vectors.isfinite().all(1) & entropies.isfinite(), texts, "states", config.skip_nan)
    if not kept:
        raise ValueError("no training query has finite states: load the model in float32 or bfloat16")
    mean, std = features.scale(vectors[kept])
    scaled = (vectors - mean) / std
    queries = [Query(states[row], scaled[row], ids[row], chosen[row][1].label, texts[row]) for row in kept]
    return queries, (mean, std)


def _tail(tokens: list[int], limit: int, bos: object) -> list[int]:
    """The last `limit` tokens, behind the first one where that is the beginning-of-text token."""
    if len(tokens) <= limit:
        return tokens
    return [tokens[0], *tokens[len(tokens) - limit + 1 :]] if tokens[0] == bos and limit > 1 else tokens[-limit:]
