"""Rows: which rows of its tasks a fit learns from, and which it is judged on."""

import math
from collections.abc import Sequence

from icrouting.config import FitConfig
from icrouting.decoder.sites import Dims
from icrouting.tasks.task import Example, Task

# Validation rows of all tasks together: more of them cost time, fewer say nothing.
MOST_HELD = 100
FEWEST_HELD = 10


def rows_to_learn_from(task: Task, tasks: Sequence[Task], config: FitConfig) -> Sequence[Example]:
    """Returns a task's training rows, and its validation slice where that is not validated on.

    Args:
        task: one of the source tasks.
        tasks: all of them.
        config: settings; without `min_steps` or `patience` the slice stays apart, as it is not
            asked for anything.
    """
    if config.min_steps and config.patience and not can_validate(tasks):
        return (*task.train, *task.validation)
    return task.train


def n_learned(tasks: Sequence[Task], config: FitConfig) -> dict[str, int]:
    """Returns how many rows of each task a training learns from."""
    n_rows = {task.name: len(rows_to_learn_from(task, tasks, config)) for task in tasks}
    return {name: min(config.n_queries, n) for name, n in n_rows.items()}


def n_extracted(tasks: Sequence[Task], config: FitConfig) -> int:
    """Returns how many few-shot prompts an extraction reads, of all tasks together."""
    return sum(min(config.n_prompts, len(task.train)) for task in tasks)


def check_rank(tasks: Sequence[Task], config: FitConfig, dims: Dims) -> None:
    """Checks that an extraction can give as many directions as are asked, before it is run.

    Raises:
        ValueError: the keys are too narrow for `config.rank`, or the prompts too few.
    """
    key_width = dims.n_kv_heads * dims.head_dim
    n_prompts = n_extracted(tasks, config)
    if config.rank > key_width:
        raise ValueError(
            f"rank must lie in 1..{key_width} (the width of the keys), got {config.rank}"
        )
    if n_prompts <= config.rank:
        raise ValueError(
            f"{config.rank} directions need more than {config.rank} prompts, got {n_prompts}: "
            "add prompts or tasks"
        )


def n_judged(tasks: Sequence[Task], config: FitConfig) -> dict[str, int]:
    """Returns how many validation rows of each task choose the router that a training keeps."""
    if not config.watches(sum(n_learned(tasks, config).values())) or not can_validate(tasks):
        return dict.fromkeys((task.name for task in tasks), 0)
    return {task.name: min(n_held_each(tasks), len(task.validation)) for task in tasks}


def n_held_each(tasks: Sequence[Task]) -> int:
    """Returns how many validation rows of each task a training is judged on, at most.

    A task without any, such as one that a warm start rehearses, leaves its share to the others.
    """
    n_judging = sum(bool(task.validation) for task in tasks)
    return math.ceil(MOST_HELD / max(1, n_judging))


def can_validate(tasks: Sequence[Task]) -> bool:
    """Returns whether the tasks hold validation rows enough to judge a training on."""
    return sum(len(task.validation) for task in tasks) >= FEWEST_HELD
