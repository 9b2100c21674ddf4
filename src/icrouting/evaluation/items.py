"""Items: which rows of a task a run asks about."""

import zlib
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from icrouting.tasks.task import Example, Task

SPARE = 24  # of a model's context, for what methods put around a prompt: virtual tokens, an answer


def within(task: Task, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[Task, str]:
    """Returns a task without rows whose prompt leaves less than `SPARE` of `limit` tokens, and a line on them, if any.

    A task that would lose all rows of a split or of a training label is left as it is: methods say what is too long.
    """

    def fits(row: Example) -> bool:
        text = task.prompt(row)  # a token takes a byte or more, but for two before the text
        return (
            room is None or len(text.encode()) + 2 <= room or len(tokenizer(text).input_ids) <= room
        )

    room = None if limit is None else limit - SPARE
    rows = {split: vars(task)[split] for split in ("train", "validation", "test")}
    kept = {split: tuple(filter(fits, own)) for split, own in rows.items()}
    left = [f"{n} {split}" for split in rows if (n := len(rows[split]) - len(kept[split]))]
    labels = [{row.label for row in of["train"]} for of in (rows, kept)]
    if not left or labels[0] != labels[1] or any(rows[split] and not kept[split] for split in rows):
        return task, ""
    return replace(
        task, **kept
    ), f"Left out, as longer than {room} tokens: {', '.join(left)} rows of {task.name}."


_ITEM_SEED = 0


def draw_items(task: Task, n_test: int) -> list[int]:
    """Returns the choice of test items, as positions in the test split (all if it is smaller).

    The same for every seed of a run: seeds differ in what methods draw, not in what they are asked.
    """
    rng = np.random.default_rng([_ITEM_SEED, zlib.crc32(task.name.encode())])
    return sorted(rng.permutation(len(task.test))[:n_test].tolist())
