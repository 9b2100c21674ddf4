"""Evaluation: every method on every task and seed, as records that are never computed twice."""

import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting import records
from icrouting.batches import tokenize
from icrouting.methods import Method
from icrouting.progress import track
from icrouting.records import Record
from icrouting.scoring import score_options
from icrouting.tasks import Task

CHUNK = 50


def draw_items(task: Task, seed: int, n_test: int) -> list[int]:
    """Returns the seeded choice of test items, as positions in the test split (all if it is smaller)."""
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    return sorted(rng.permutation(len(task.test))[:n_test].tolist())


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    sources: Sequence[Task],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    n_test: int,
    file: Path,
) -> None:
    """Appends a record for every method, task, seed and test item that `file` has none of.

    Methods take turns on each chunk of items, so that a slow spell of the machine meets all of them.

    Args:
        model: the frozen decoder.
        tokenizer: its tokenizer.
        methods: what to compare.
        sources: the tasks that methods may learn from.
        tasks: the tasks to test on.
        seeds: each draws the test items, and the demonstrations where there are some.
        n_test: test items per task and seed.
        file: the records' JSONL file.
    """
    done = {(r.method, r.task, r.seed, r.index) for r in records.read(file)} if file.exists() else set()
    for seed in seeds:
        jobs = []
        for task in tasks:
            items = draw_items(task, seed, n_test)
            for chunk in (items[start : start + CHUNK] for start in range(0, len(items), CHUNK)):
                for method in methods:
                    missing = [i for i in chunk if (method.name, task.name, seed, i) not in done]
                    jobs += [(method, task, missing)] if missing else []
        if not jobs:
            continue
        fit_all(model, tokenizer, methods, sources, seed)
        sizes = [len(missing) for _, _, missing in jobs]
        for method, task, missing in track(jobs, f"evaluation, seed {seed}", sizes, "predictions"):
            records.append(file, predict(model, tokenizer, method, task, seed, missing))


def fit_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    sources: Sequence[Task],
    seed: int,
) -> None:
    """Lets every method learn what it learns, each with a draw of its own that no other method moves."""
    for method in methods:
        method.fit(model, tokenizer, sources, np.random.default_rng([seed, zlib.crc32(method.name.encode())]))


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    task: Task,
    seed: int,
    indices: Sequence[int],
) -> list[Record]:
    """Returns the records of one method on some test items of one task."""
    examples = [task.test[index] for index in indices]
    prompts = [method.prompt(task, example) for example in examples]
    options = [task.options(example) for example in examples]
    n_tokens = [len(tokens) for tokens in tokenize(tokenizer, [prompt.text for prompt in prompts])]
    started = time.monotonic()
    with method.applied(model, prompts):
        scores = score_options(model, tokenizer, prompts, options)
    seconds = (time.monotonic() - started) / len(indices)
    return [
        Record(
            method=method.name,
            task=task.name,
            seed=seed,
            index=index,
            label=example.label,
            prediction=int(row.argmax()),
            option_logits=tuple(row[: len(chosen)].tolist()),
            n_tokens=length,
            seconds=seconds,
        )
        for index, example, chosen, row, length in zip(indices, examples, options, scores, n_tokens, strict=True)
    ]


def time_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    task: Task,
    *,
    n_items: int = 4,
    n_rounds: int = 5,
) -> list[dict[str, object]]:
    """Returns each method's time over zero-shot's, measured in turns on the same items.

    Every prompt runs as it would arrive at a server: alone in its context, nothing shared between prompts.

    Args:
        model: the frozen decoder.
        tokenizer: its tokenizer.
        methods: fitted methods; the first is the baseline.
        task: where the items come from.
        n_items: prompts per turn, in one batch.
        n_rounds: turns of each method.

    Returns:
        One dict per other method: its name, the median ratio, the smallest and the largest.
    """
    examples = task.test[:n_items]
    options = [task.options(example) for example in examples]
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in track(range(n_rounds + 1), "timing, in turns", [1] * (n_rounds + 1), "turns"):
        for method in methods:
            prompts = [method.prompt(task, example) for example in examples]
            started = time.monotonic()
            with method.applied(model, prompts):
                score_options(model, tokenizer, [prompt.text for prompt in prompts], options)
            seconds[method.name].append(time.monotonic() - started)
    baseline, *others = methods
    note = f"median of {n_rounds} turns on {len(examples)} prompts of {task.name}"
    rows = []
    for method in others:
        ratios = np.array(seconds[method.name][1:]) / np.array(seconds[baseline.name][1:])
        middle, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
        rows.append({"method": method.name, "ratio": middle, "low": low, "high": high, "note": note})
    return rows
