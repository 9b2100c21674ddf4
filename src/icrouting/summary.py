"""Summary: everything a report says, as values."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from icrouting import metrics
from icrouting.metrics import Estimate

BASELINE = "zero-shot"


@dataclass(frozen=True)
class Gain:
    """A method's paired difference to the baseline on one task; `p_holm` is corrected over the method's tasks."""

    change: Estimate
    p_value: float
    p_holm: float

    @property
    def direction(self) -> int:
        """1 or -1 where the difference is significant after correction, else 0."""
        return int(np.sign(self.change.value)) if self.p_holm < metrics.SIGNIFICANCE else 0


@dataclass(frozen=True)
class Cell:
    """One method on one task; `gain` is None for the baseline or without a common item.

    `confusion` counts by label (rows) and prediction (columns); `seconds` is a median, `n_tokens` a mean.
    """

    method: str
    task: str
    accuracy: Estimate
    macro_f1: Estimate
    gain: Gain | None
    is_above_chance: bool
    by_seed: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    seconds: float
    n_tokens: float


@dataclass(frozen=True)
class TaskLine:
    """What a task brings along: its section of the table, its size and its levels without any model."""

    name: str
    section: str
    n_items: int
    chance: float
    majority: float


@dataclass(frozen=True)
class GroupMean:
    """A method's unweighted mean over the tasks of a group; `gain` over those shared with the baseline."""

    method: str
    group: str
    accuracy: Estimate
    gain: Estimate | None


@dataclass(frozen=True)
class Rival:
    """Another method's paired lead over the headline, as the mean over the tasks that both have."""

    method: str
    lead: Estimate


@dataclass(frozen=True)
class MethodLine:
    """A method's cost per example and its collapse count; the counts are None for the baseline."""

    name: str
    seconds: float
    n_tokens: float
    n_collapsed: int | None
    n_collapsed_significantly: int | None


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    Attributes:
        headline: the method that the conclusion speaks of: "icr", else the last; None for a lone baseline.
        groups: task names by group: each section, then "unseen" and "all".
        unfinished: what the records lack, in words; empty for a complete run.
        notes: what the run cut short or subsampled.
        origin: model, seeds, size, commit and command in words.
    """

    headline: str | None
    methods: tuple[MethodLine, ...]
    tasks: tuple[TaskLine, ...]
    groups: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    means: tuple[GroupMean, ...]
    rivals: tuple[Rival, ...]
    unfinished: tuple[str, ...]
    notes: tuple[str, ...]
    origin: str

    def cell(self, method: str, task: str) -> Cell | None:
        """The cell of a method and a task; None where there are no records."""
        return next((cell for cell in self.cells if (cell.method, cell.task) == (method, task)), None)

    def mean(self, method: str, group: str) -> GroupMean | None:
        """A method's mean over a group; None where there are no records."""
        return next((mean for mean in self.means if (mean.method, mean.group) == (method, group)), None)

    @property
    def distinct_groups(self) -> tuple[str, ...]:
        """The groups, without those that repeat the tasks of an earlier one."""
        first: dict[tuple[str, ...], str] = {}
        for group, tasks in self.groups.items():
            first.setdefault(tasks, group)
        return tuple(first.values())
