"""What `reach` computes of a task once, and keeps on disk: see `benchmarks.reach`.

Of a task are kept, in a folder of its own: the trunk's states of its labelled training rows, of the
rows that a training is judged on and of its test rows; and its traces, which are what the model
makes of training and test rows behind demonstrations: the options' scores, and for training rows
the last token's queries and keys in every layer. Directions are the fit's, of these queries and
keys, so that no further prompt is read for them.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.batches import by_length, fits
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import LateEntry, entering_states, late_entry
from icrouting.decoder.passes import after_prefix, by_context, next_token_logits
from icrouting.decoder.scoring import counted_tokens
from icrouting.fitting import queries as reading
from icrouting.fitting.capture import captured
from icrouting.fitting.pca import QKMoments, fit_pids
from icrouting.fitting.queries import Query
from icrouting.fitting.shelf import load_pids, save_pids
from icrouting.fitting.trunk import pad_states
from icrouting.routing.features import features_of
from icrouting.routing.pids import PIDs, late_third
from icrouting.runtime.files import load_json, save_json
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot
from icrouting.tasks.task import Example, Task

TRACES_FILE = "traces.safetensors"
SETTINGS_FILE = "settings.json"
SEED = 0
DEMOS_PER_CLASS = 5
BATCH_TOKENS = 4096
BATCH_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of each task is read: rows, and rows that share their demonstrations."""

    rows: int = 200
    held: int = 60
    items: int = 60
    sharing: int = 25


@dataclasses.dataclass(frozen=True)
class Parts:
    """What was computed of a task.

    Attributes:
        name: the task's.
        train: queries of the labelled training rows; so are `held` and `test`.
        traces: by name, [n_layers, n_rows, width] for queries and keys, [n_rows, n_options] for the
            few-shot scores of training and test rows, padded with -inf.
        folder: where all of it lies.
    """

    name: str
    train: list[Query]
    held: list[Query]
    test: list[Query]
    traces: dict[str, Tensor]
    folder: Path

    def labels(self, part: str) -> list[int]:
        """Returns the answers of "train", "held" or "test"."""
        return [query.answer for query in getattr(self, part)]


class World:
    """A model, what reads prompts for it, and the folder that keeps what came."""

    def __init__(self, name: str, dtype: str | None, encoder: str, out: Path, sizes: Sizes):
        chosen_dtype = None if dtype is None else getattr(torch, dtype)
        model, tokenizer = load_model(name, dtype=chosen_dtype)
        self.decoder = Decoder.of(model, tokenizer)
        self.config = FitConfig(encoder=encoder)
        self.features = features_of(encoder, self.decoder, "cpu")
        self.late = late_third(self.decoder.dims.n_layers)
        self.sizes = sizes
        self.out = out
        settings = {
            "model": name,
            "dtype": str(model.dtype),
            "encoder": encoder,
            **dataclasses.asdict(sizes),
        }
        out.mkdir(parents=True, exist_ok=True)
        _check_same(out / SETTINGS_FILE, settings)

    def parts_of(self, task: Task) -> Parts:
        """Returns the parts of a task, computed now or earlier."""
        task = task.bound_to(self.decoder.tokenizer)
        folder = self.out / "store" / task.name
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(SEED).permutation(len(task.train))
        places = order[: self.sizes.rows].tolist()
        rows = {
            "train": [task.train[place] for place in places],
            "held": list(task.validation[: self.sizes.held]),
            "test": list(task.test[: self.sizes.items]),
        }
        seconds = {}
        queries = {}
        for part, part_rows in rows.items():
            start = time.perf_counter()
            queries[part] = self._queries(task, part_rows, folder / part)
            seconds[part] = time.perf_counter() - start
        start = time.perf_counter()
        traces = self._traces(task, places, rows["test"], folder, queries["train"])
        seconds["few-shot"] = time.perf_counter() - start
        start = time.perf_counter()
        traces["zero_shot"] = self._zero_shot(queries["test"], folder)
        seconds["zero-shot"] = time.perf_counter() - start
        print(task.name, "read", *(f"{name} {s:.0f} s" for name, s in seconds.items()), flush=True)
        return Parts(task.name, **queries, traces=traces, folder=folder)

    def _queries(self, task: Task, rows: Sequence[Example], folder: Path) -> list[Query]:
        folder.mkdir(exist_ok=True)
        examples = [(task, row) for row in rows]
        place = (self.decoder, examples, self.features, self.late[0], self.config, folder)
        read = reading._read(*place)
        scale = self.features.scale(read.vectors)
        queries = reading._queries(examples, read, range(len(read.rows)), scale)
        # A target's place is its option's.
        if [query.label for query in queries] != [row.label for row in rows]:
            raise ValueError(f"task {task.name!r} scores whole labels: expected first tokens alone")
        return queries

    def _traces(
        self, task: Task, places: list[int], test: list[Example], folder: Path, train: list[Query]
    ) -> dict[str, Tensor]:
        """Returns the traces that a folder keeps, computed if there are none."""
        file = folder / TRACES_FILE
        if not file.exists():
            per_class, of_train, of_test = few_shot_prompts(
                self.decoder, task, places, test, self.sizes.sharing
            )
            tensors = traced(self.decoder, task, of_train, [task.train[place] for place in places])
            tested = traced(self.decoder, task, of_test, test)
            tensors["test_scores"] = tested["scores"]
            # What the router may read, so that the traces can be predicted without the model.
            tensors["encoder"] = torch.stack([query.features for query in train])
            tensors["hidden"] = torch.stack([query.state.hidden[-1].float() for query in train])
            save_tensors(file, tensors, {"demos_per_class": str(per_class)})
        return load_tensors(file)[0]

    def _zero_shot(self, queries: list[Query], folder: Path) -> Tensor:
        """Returns the untouched model's scores of queries, from their trunk's states."""
        file = folder / "zero_shot.safetensors"
        if not file.exists():
            with late_entry(self.decoder.model, self.late[0]) as entry:
                save_tensors(file, {"scores": scores_of(queries, self.decoder, entry)})
        return load_tensors(file)[0]["scores"]

    def pids_of(self, parts: Parts, layers: tuple[int, ...], rank: int) -> PIDs:
        """Returns the directions of a task's traces, kept beside them."""
        folder = parts.folder / f"directions-{layers[0]}"
        folder.mkdir(exist_ok=True)
        config = dataclasses.replace(self.config, rank=rank)
        pids = load_pids(folder, layers, config)
        if pids is None:
            pids = directions([parts.traces], layers, rank)
            save_pids(folder, pids, config)
        return pids

    def entering(self, queries: Sequence[Query], first: int) -> list[Query]:
        """Returns queries with the states that enter another layer; the layers below run."""
        token_lists = [query.state.tokens for query in queries]
        states = entering_states(self.decoder, token_lists, first)
        moved = []
        for query, hidden in zip(queries, states, strict=True):
            state = dataclasses.replace(query.state, hidden=hidden)
            moved.append(dataclasses.replace(query, state=state))
        return moved


def _check_same(file: Path, settings: dict) -> None:
    """Keeps settings in a file; ValueError if it holds others."""
    if not file.exists():
        save_json(file, settings)
    kept = load_json(file)
    if kept != json.loads(json.dumps(settings)):
        raise ValueError(f"{file.parent} holds {kept}, got {settings}: choose another --out")


def few_shot_prompts(
    decoder: Decoder, task: Task, places: list[int], test: list[Example], sharing: int
) -> tuple[int, list[Prompt], list[Prompt]]:
    """Returns few-shot prompts of training and of test rows, `sharing` to a context.

    No training row stands among its own demonstrations. Where the model's context is too short for
    the usual number of these a class, it is the largest that fits; it is returned first.
    """
    for per_class in range(DEMOS_PER_CLASS, 0, -1):
        rng = np.random.default_rng(SEED + 1)
        of_train = []
        for start in range(0, len(places), sharing):
            block = places[start : start + sharing]
            demos = [(task, demo) for demo in balanced_demos(task, per_class, rng, block)]
            of_train += [few_shot(task, task.train[place], demos) for place in block]
        of_test = []
        for start in range(0, len(test), sharing):
            demos = [(task, demo) for demo in balanced_demos(task, per_class, rng)]
            of_test += [few_shot(task, row, demos) for row in test[start : start + sharing]]
        room = decoder.context_length
        prompts = [*of_train, *of_test]
        if room is None or all(fits(decoder.tokenizer, prompt.text, room) for prompt in prompts):
            return per_class, of_train, of_test
    raise ValueError(f"no few-shot prompt of task {task.name!r} fits the model's context")


@torch.no_grad()
def traced(
    decoder: Decoder, task: Task, prompts: list[Prompt], rows: list[Example]
) -> dict[str, Tensor]:
    """Returns the options' scores behind prompts, and the last token's queries and keys."""
    token_lists = decoder.tokenize([prompt.text for prompt in prompts])
    option_ids = []
    for prompt, row in zip(prompts, rows, strict=True):
        answers = counted_tokens(
            decoder.tokenizer, prompt.query, task.options(row), "first", prompt.joint
        )
        option_ids.append([tokens[0] for tokens in answers])
    scores = torch.full((len(prompts), max(map(len, option_ids))), -torch.inf)
    layers = range(decoder.dims.n_layers)
    blocks = []
    order = []
    with captured(decoder.model, layers) as stores:
        for cache, batch in by_context(decoder, prompts, token_lists, 4 * BATCH_TOKENS):
            if cache is None:
                logits = next_token_logits(decoder.model, batch)
            else:
                logits = after_prefix(decoder.model, cache, batch)
            for row, row_logits in zip(batch.rows, logits.cpu(), strict=True):
                ids = option_ids[row]
                scores[row, : len(ids)] = row_logits[ids]
            last = batch.last.cpu()
            rows = torch.arange(len(last))
            sides = []
            for side in ("query", "key"):
                outputs = [store[side][rows, last].float().cpu() for store in stores]
                sides.append(torch.stack(outputs))
            blocks.append(sides)
            order += batch.rows
    in_order = torch.tensor(order).argsort()
    tensors = {"scores": scores}
    for number, side in enumerate(("query", "key")):
        joined = torch.cat([block[number] for block in blocks], dim=1)
        tensors[side] = joined[:, in_order].contiguous()
    return tensors


def directions(traces: Sequence[dict[str, Tensor]], layers: tuple[int, ...], rank: int) -> PIDs:
    """Returns the fit's directions of the traces of one or several tasks, pooled."""
    sides = {}
    for side in ("query", "key"):
        sides[side] = torch.cat([trace[side][list(layers)] for trace in traces], dim=1)
    moments = QKMoments(len(layers), sides["query"].shape[-1], sides["key"].shape[-1])
    moments.update(sides["query"], sides["key"])
    return fit_pids(moments, layers, rank, "pca", torch.Generator().manual_seed(SEED))


@torch.no_grad()
def scores_of(queries: Sequence[Query], decoder: Decoder, entry: LateEntry, route=None) -> Tensor:
    """Returns the options' scores of queries from their trunk's states, padded with -inf.

    `route` is called with the queries of each batch before it runs, and may route it.
    """
    most = max(len(query.option_ids) for query in queries)
    scores = torch.full((len(queries), most), -torch.inf)
    token_lists = [query.state.tokens for query in queries]
    for group in by_length(token_lists, BATCH_TOKENS):
        for start in range(0, len(group), BATCH_ROWS):
            places = group[start : start + BATCH_ROWS]
            chosen = [queries[place] for place in places]
            if route is not None:
                route(chosen)
            batch, hidden = pad_states([query.state for query in chosen], decoder.pad_id)
            logits = entry(batch.to(decoder.device), hidden).cpu()
            for place, row_logits in zip(places, logits, strict=True):
                ids = queries[place].option_ids
                scores[place, : len(ids)] = row_logits[ids].float()
    return scores
