"""Items: which rows of a task a run asks about."""

import zlib
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from icrouting.decoder.batches import fits
from icrouting.tasks.task import Example, Task

SPARE = 24  # of a model's context, for what methods put around a prompt: virtual tokens, an answer
_ITEM_SEED = 0


def within(task: Task, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[Task, str]:
    """Returns a task without rows that are too long for a model, and a line on them, if any.

    The prompt of a row must leave `SPARE` of `limit` tokens (None: no limit). A task that would
    lose all rows of a split or of a training label is left as it is: methods say what is too long.
    """
    if limit is None:
        return task, ""
    room = limit - SPARE
    shortened: dict[str, tuple[Example, ...]] = {}
    counts = []
    for split in ("train", "validation", "test"):
        rows = vars(task)[split]
        kept_rows = tuple(row for row in rows if fits(tokenizer, task.prompt(row), room))
        if rows and not kept_rows:
            return task, ""
        if len(kept_rows) < len(rows):
            counts.append(f"{len(rows) - len(kept_rows)} {split}")
        shortened[split] = kept_rows
    if not counts or _labels(shortened["train"]) != _labels(task.train):
        return task, ""
    rows = "row" if counts[-1].startswith("1 ") else "rows"
    line = f"Left out, as longer than {room} tokens: {', '.join(counts)} {rows} of {task.name}."
    return replace(task, **shortened), line


def _labels(rows: tuple[Example, ...]) -> set[int]:
    return {row.label for row in rows}


def draw_items(task: Task, n_test: int) -> list[int]:
    """Returns the choice of test items, as positions in the test split (all if it is smaller).

    The same for every seed of a run: seeds differ in what methods draw, not in what they are asked.
    """
    rng = np.random.default_rng([_ITEM_SEED, zlib.crc32(task.name.encode())])
    return sorted(rng.permutation(len(task.test))[:n_test].tolist())
