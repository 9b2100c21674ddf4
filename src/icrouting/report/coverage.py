"""Coverage: which of a run's records a report counts, and what they lack."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

# Records by method and task.
Cells = Mapping[tuple[str, str], pd.DataFrame]
# A method, a task that it cannot answer, and why.
Refusal = Sequence[str]


def counted(lines: pd.DataFrame, refusals: Sequence[Refusal]) -> dict[Any, pd.DataFrame]:
    """Returns the records that a report counts by method and task, in their order.

    A refusal may come amid a seed. Of a refused cell only the seeds with every answer count: the
    others would compare the items before the refusal with all of them.
    """
    n_answers = lines.groupby(["method", "task", "seed"]).label.transform("size")
    most_answers = n_answers.groupby(lines.task).transform("max")
    is_whole = n_answers == most_answers
    refused_cells = [(method, task) for method, task, _ in refusals]
    cell_of_line = pd.MultiIndex.from_arrays([lines.method, lines.task])
    is_refused = cell_of_line.isin(refused_cells)
    shown = lines.loc[is_whole | ~is_refused]
    return dict(iter(shown.groupby(["method", "task"], sort=False)))


def fullest_records(records_by_cell: Cells) -> dict[str, pd.DataFrame]:
    """Returns by task the records of the method with most of them.

    A task's size and its levels without a model follow from these.
    """
    fullest = {}
    for (_, task), records in records_by_cell.items():
        if task not in fullest or len(records) > len(fullest[task]):
            fullest[task] = records
    return fullest


def unfinished(
    methods: Sequence[str],
    tasks: Sequence[str],
    records_by_cell: Cells,
    fullest: Mapping[str, pd.DataFrame],
    refusals: Sequence[Refusal],
) -> list[str]:
    """Returns in words what is missing, method by method.

    Whole cells are missed against the configuration, records against the task's fullest method.
    """
    refused_cells = {(method, task) for method, task, _ in refusals}
    lines = []
    for method in methods:
        missing = []
        short = []
        for task in tasks:
            n_records = len(records_by_cell.get((method, task), ()))
            n_most = len(fullest.get(task, ()))
            if n_records == 0 and (method, task) not in refused_cells:
                missing.append(task)
            if 0 < n_records < n_most:
                short.append(f"{n_records} of {n_most} predictions on {task}")
        if missing:
            lines.append(f"{method}: no records on {', '.join(missing)}")
        if short:
            lines.append(f"{method}: {', '.join(short)}")
    return lines
