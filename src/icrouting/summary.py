"""Summary: everything a report says, as frames of figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from icrouting.metrics import Estimate

BASELINE = "zero-shot"


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, or the mean over a group; its size and its levels without any model."""

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


@dataclass(frozen=True)
class Method:
    """A method's cost per example and its collapse count, over the tasks compared with the baseline."""

    name: str
    seconds: float
    n_tokens: float
    n_compared: int
    n_collapsed: int
    n_collapsed_significantly: int


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    Attributes:
        headline: the method that the conclusion speaks of: "icr", else the last; None for a lone baseline.
        groups: task names by group: each section, then "unseen" and "all".
        rows: each section's tasks and their mean, then the means over the unseen and over all tasks.
        lines: by kind, name and method: accuracy and gain, the paired difference to the baseline; on a task also the
            gain's `direction` (1 or -1 where significant, else 0), `p_holm` corrected over the method's tasks,
            `confusion` counts by label (rows) and prediction, median `seconds` and mean `n_tokens`. An estimate `x`
            has its interval from `x_low` to `x_high` and its n in `x_n`; one that cannot be had is NaN with n = 0.
        rivals: by method: its paired lead over the headline, the mean over the tasks that both have.
        unfinished: what the records lack, in words; empty for a complete run.
        notes: what the run cut short or subsampled.
        origin: model, seeds, size, commit and command in words.
    """

    headline: str | None
    groups: Mapping[str, tuple[str, ...]]
    methods: Sequence[Method]
    rows: Sequence[Row]
    lines: pd.DataFrame
    rivals: Mapping[str, Estimate]
    unfinished: Sequence[str]
    notes: tuple[str, ...]
    origin: str

    @property
    def tasks(self) -> list[Row]:
        """The rows of tasks."""
        return [row for row in self.rows if row.kind == "task"]

    def line(self, kind: str, name: str, method: str) -> Any:
        """A method's line on a task or group; None where there are no records."""
        key = (kind, name, method)
        return self.lines.loc[key] if key in self.lines.index else None

    def cells(self, method: str) -> Any:
        """A method's lines on tasks, by name."""
        return self.lines.xs(("task", method), level=("kind", "method"))
