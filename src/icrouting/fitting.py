"""The stages of a fit, each of which can be taken up again from what an earlier run kept in its folder."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.batches import context_length, pad_id_of, tokenize
from icrouting.capture import capture_last_tokens
from icrouting.config import FitConfig
from icrouting.families import dims_of
from icrouting.features import Features, Scale
from icrouting.pids import PIDs, QKMoments, fit_pids
from icrouting.progress import track
from icrouting.prompts import extraction_prompts
from icrouting.scoring import option_ids
from icrouting.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks import Task, rows_digest
from icrouting.train import Query
from icrouting.trunk import run_trunk

SAVE_EVERY_SECONDS = 20.0
READ_AT_ONCE = 64


def claim_folder(folder: Path, config: FitConfig, tasks: Sequence[Task], fingerprint: str) -> None:
    """Makes a fit's folder, or checks that the fit begun in it is this very one.

    Raises:
        ValueError: the folder holds another fit; the differences are named.
    """
    settings = {**dataclasses.asdict(config), "tasks": [task.name for task in tasks]}
    settings |= {"model": fingerprint, "rows": rows_digest(tasks)}
    settings = json.loads(json.dumps(settings))
    file = folder / "fit.json"
    if file.exists():
        found = load_json(file)
        different = [key for key in settings if found.get(key) != settings[key]]
        if different:
            changes = ", ".join(f"{key} was {found.get(key)!r}, is {settings[key]!r}" for key in different)
            raise ValueError(f"{folder} holds a fit with other settings ({changes}): choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_json(file, settings)


def extract(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    folder: Path | None,
) -> PIDs:
    """Returns the PIDs of few-shot prompts of all source tasks, pooled (stages 1 and 2)."""
    rng = np.random.default_rng(config.seed)
    texts = [text for task in tasks for text in extraction_prompts(task, config.n_prompts, config.demos_per_class, rng)]
    dims = dims_of(model)
    moments = QKMoments(len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    kept = folder / "moments.safetensors" if folder else None
    if kept is not None and kept.exists():
        moments = QKMoments.from_tensors(load_tensors(kept)[0])
    saved = time.monotonic()
    for query, key in capture_last_tokens(model, tokenizer, texts, layers, n_done=moments.count):
        moments.update(query, key)
        is_last = moments.count == len(texts)
        if kept is not None and (is_last or time.monotonic() - saved > SAVE_EVERY_SECONDS):
            save_tensors(kept, moments.tensors())
            saved = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    return fit_pids(moments, layers, config.rank, config.basis, generator)


def training_queries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    features: Features,
    first_layer: int,
    config: FitConfig,
) -> tuple[list[Query], Scale]:
    """Returns the training queries of all source tasks, trunk run and features computed, and those's scale."""
    rng = np.random.default_rng(config.seed + 1)
    chosen = [
        (task, task.train[index]) for task in tasks for index in rng.permutation(len(task.train))[: config.n_queries]
    ]
    texts = [task.prompt(example) for task, example in chosen]
    ids = [
        option_ids(tokenizer, text, task.options(example)) for text, (task, example) in zip(texts, chosen, strict=True)
    ]
    limit = min(config.max_tokens, context_length(model) or config.max_tokens)
    token_lists = [_tail(tokens, limit, tokenizer.bos_token_id) for tokens in tokenize(tokenizer, texts)]
    states = run_trunk(model, token_lists, first_layer, pad_id_of(tokenizer))
    chunks = [states[start : start + READ_AT_ONCE] for start in range(0, len(states), READ_AT_ONCE)]
    vectors = torch.cat(
        [
            features.read([state.tokens for state in chunk], [state.hidden for state in chunk]).cpu()
            for chunk in track(chunks, "features", [len(chunk) for chunk in chunks], "queries")
        ]
    )
    mean, std = features.scale(vectors)
    queries = [
        Query(state, vector, option_list, example.label)
        for state, vector, option_list, (_, example) in zip(states, (vectors - mean) / std, ids, chosen, strict=True)
    ]
    return queries, (mean, std)


def _tail(tokens: list[int], limit: int, bos: object) -> list[int]:
    """The last `limit` tokens, behind the first one where that is the beginning-of-text token."""
    if len(tokens) <= limit:
        return tokens
    return [tokens[0], *tokens[len(tokens) - limit + 1 :]] if tokens[0] == bos and limit > 1 else tokens[-limit:]
