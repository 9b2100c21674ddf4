"""Rows: the lines of a report's table, tasks by section and the means over groups of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from icrouting.report import metrics
from icrouting.report.run import RunTask

# By a task's role or else its group, what its section is called; the table has them in this order.
SECTIONS = {"source": "source", "in-domain": "in-domain, unseen", "near": "near", "far": "far"}


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, or the mean over a group; its size and levels without a model.

    Attributes:
        section: what the table shows it under; empty for a mean across sections.
        n_tasks: tasks behind it; those without records are counted too.
        n_items: test items behind it, seeds aside.
        chance: accuracy of guessing.
        majority: accuracy of always giving the most frequent label.
    """

    kind: Literal["task", "mean"]
    name: str
    section: str
    n_tasks: int
    n_items: int
    chance: float
    majority: float

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"mean {self.name}" if self.kind == "mean" else self.name


def sections_of(tasks: Sequence[RunTask]) -> dict[str, str]:
    """Returns each task's section by the task's name, from the tasks that config.json describes."""
    sections = {}
    for task in tasks:
        kind = "source" if task.role == "source" else task.group
        sections[task.name] = SECTIONS.get(kind, kind)
    return sections


def groups_of(sections: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns task names by group: each section, then "unseen" (where there are any) and "all"."""
    order = list(SECTIONS.values())
    # Groups that only a task file knows come last, in its order.
    for section in sections.values():
        if section not in order:
            order.append(section)
    groups = {}
    for section in order:
        members = tuple(task for task in sections if sections[task] == section)
        if members:
            groups[section] = members
    source = groups.get("source", ())
    unseen = []
    for section, members in groups.items():
        if section != "source":
            unseen += members
    if unseen:
        groups["unseen"] = tuple(unseen)
    groups["all"] = (*source, *unseen)
    return groups


def rows_of(
    groups: Mapping[str, tuple[str, ...]],
    sections: Mapping[str, str],
    fullest: Mapping[str, pd.DataFrame],
) -> list[Row]:
    """Returns the table's lines: each section's tasks and their mean, then means across sections.

    Args:
        groups: task names by group, from `groups_of`.
        sections: each task's section, from `sections_of`.
        fullest: by task the records of the method that answered most of it; tasks that no method
            has answered have no line.
    """
    task_rows = {}
    for task, records in fullest.items():
        task_rows[task] = _task_row(task, sections[task], records)
    rows = []
    shown_groups = set()
    for group, tasks in groups.items():
        scored = [task_rows[task] for task in tasks if task in task_rows]
        # A group of the same tasks as an earlier one would repeat its mean.
        if scored and tasks not in shown_groups:
            members = [row for row in scored if row.section == group]
            rows += members
            rows.append(_mean_row(group, group if members else "", len(tasks), scored))
        shown_groups.add(tasks)
    return rows


def _task_row(task: str, section: str, records: pd.DataFrame) -> Row:
    return Row(
        kind="task",
        name=task,
        section=section,
        n_tasks=1,
        n_items=records.item.nunique(),
        chance=metrics.chance(records),
        majority=metrics.majority(records),
    )


def _mean_row(group: str, section: str, n_tasks: int, members: Sequence[Row]) -> Row:
    """The mean's line: every task weighs alike, whatever its size."""
    return Row(
        kind="mean",
        name=group,
        section=section,
        n_tasks=n_tasks,
        n_items=sum(row.n_items for row in members),
        chance=float(np.mean([row.chance for row in members])),
        majority=float(np.mean([row.majority for row in members])),
    )
