"""Summary: everything a report says, as frames of figures.

It is counted from the records and the configuration of a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from icrouting.evaluation.records import BASELINE, Record
from icrouting.report import metrics
from icrouting.report.calibrated import calibrated
from icrouting.report.coverage import Cells, counted, fullest_records, unfinished
from icrouting.report.rows import Row, groups_of, rows_of, sections_of
from icrouting.report.run import Run
from icrouting.routing.priors import Way

HEADLINE = "icr"
# With more options than this a confusion matrix cannot be read.
MOST_OPTIONS = 30
ORIGIN = (
    "Model {model}, {dtype}, up to {n_items} items a task, seeds {seeds}, {created}, "
    "commit {commit}: {command}"
)


@dataclass(frozen=True)
class Method:
    """A method's cost per example, and on how many tasks it collapses (paper, section 7).

    Attributes:
        seconds: mean over its tasks of the median time of an example.
        n_tokens: mean over its tasks of an example's mean tokens.
        n_compared: tasks that it shares with the baseline.
        n_collapsed: of these, tasks with a gain below 0.
        n_collapsed_significantly: of these, tasks where that is significant.
    """

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
        headline: the method that the conclusion speaks of: "icr", else the last; None for a lone
            baseline.
        groups: task names by group: each section, then "unseen" and "all".
        rows: each section's tasks and their mean, then the means over the unseen and over all
            tasks.
        lines: by kind, name and method: accuracy and gain, the paired difference to the baseline;
            on a task also the gain's `direction` (1 or -1 where significant, else 0), `p_holm`
            corrected over the method's tasks, `confusion` counts by label (rows) and prediction
            (of 30 options at most), median `seconds` and mean `n_tokens`. `by_seed` is each seed's
            accuracy, `gain_by_seed` its gain, by seed (of a mean, those of all tasks). An estimate
            `x` has its interval from `x_low` to `x_high`, its n in `x_n` (0: none).
        rivals: by method: its paired lead over the headline, the mean over the tasks that both
            have.
        unfinished: what the records lack, in words; empty for a complete run.
        notes: what the run cut short or subsampled.
        origin: model, seeds, size, commit and command in words.
    """

    headline: str | None
    groups: Mapping[str, tuple[str, ...]]
    methods: Sequence[Method]
    rows: Sequence[Row]
    lines: pd.DataFrame
    rivals: Mapping[str, metrics.Estimate]
    unfinished: Sequence[str]
    notes: tuple[str, ...]
    origin: str

    @property
    def tasks(self) -> list[Row]:
        """The rows of tasks."""
        return [row for row in self.rows if row.kind == "task"]

    def line(self, kind: str, name: str, method: str) -> Any:
        """Returns a method's line on a task or group; None where there are no records."""
        key = (kind, name, method)
        return self.lines.loc[key] if key in self.lines.index else None

    def cells(self, method: str) -> Any:
        """Returns a method's lines on tasks, by name."""
        return self.lines.xs(("task", method), level=("kind", "method"))


def summarise(records: Sequence[Record], run: Run, calibration: Way | None = None) -> Summary:
    """Returns the figures of a run, finished or in progress.

    Args:
        records: the run's.
        run: what was run.
        calibration: takes each option's prior away from the answers of every method, the baseline
            among them; gains are over the calibrated baseline then. None leaves them as they are.

    Raises:
        ValueError: there are no records, or some of a task that the run does not describe, or none
            that can be calibrated.
    """
    if not records:
        raise ValueError("no records to summarise: the run has not scored an example yet")
    refusals = run.refused
    lines_of_records = metrics.frame(records)
    if calibration is not None:
        lines_of_records = calibrated(lines_of_records, calibration)
        if lines_of_records.empty:
            raise ValueError(
                "nothing to calibrate: a task needs as many answered items as it has options, "
                "and answers that were kept with their logits"
            )
    records_by_cell = counted(lines_of_records, refusals)
    sections = sections_of(run.tasks)
    undescribed = {task for _, task in records_by_cell} - set(sections)
    if undescribed:
        raise ValueError(
            f"config.json does not describe the tasks {sorted(undescribed)}, which have records"
        )
    groups = groups_of(sections)
    fullest = fullest_records(records_by_cell)
    # Methods stand as the run names them; what only the records know comes after.
    scored_methods = [method for method, _ in records_by_cell]
    methods = list(dict.fromkeys([*run.methods, *scored_methods]))
    cells = _cells(methods, groups["all"], records_by_cell)
    headline = _headline(list(cells.method))
    rows = rows_of(groups, sections, fullest)
    lines = pd.concat([cells, _means(cells, groups)])
    skip_notes = []
    for method, task, n_items in run.skipped:
        skip_notes.append(
            f"Left out, as scores are not finite there: {n_items} test items of {task} ({method})."
        )
    refusal_notes = [f"{method} does not fit {task}: {why}" for method, task, why in refusals]
    return Summary(
        headline=headline,
        groups=groups,
        methods=_methods(cells),
        rows=rows,
        lines=lines.set_index(["kind", "name", "method"]),
        rivals=_rivals(headline, records_by_cell),
        unfinished=unfinished(methods, list(sections), records_by_cell, fullest, refusals),
        notes=(*run.notes, *refusal_notes, *skip_notes),
        origin=_origin(run, _most_items(rows)),
    )


def _headline(methods: Sequence[str]) -> str | None:
    """The method that the conclusion speaks of."""
    others = [method for method in methods if method != BASELINE]
    if HEADLINE in others:
        return HEADLINE
    return others[-1] if others else None


def _most_items(rows: Sequence[Row]) -> int:
    """The items of the task with most of them, which may have fewer than were asked for."""
    return max(row.n_items for row in rows if row.kind == "task")


def _origin(run: Run, n_items: int) -> str:
    """Where the figures come from, in words."""
    return ORIGIN.format(
        model=run.model,
        # Old run folders do not name their dtype.
        dtype=run.dtype or "dtype not kept",
        n_items=n_items,
        seeds=", ".join(str(seed) for seed in run.seeds),
        created=run.created,
        commit=run.commit,
        command=run.command,
    )


def _cells(methods: Sequence[str], tasks: Sequence[str], records_by_cell: Cells) -> pd.DataFrame:
    """A line a method and task that have records."""
    cells = []
    for method in methods:
        for task in tasks:
            if (method, task) in records_by_cell:
                cells.append(_cell(method, task, records_by_cell))
    frame = pd.DataFrame(cells)
    # Holm's family is one method's tasks: whether it hurts on any of them is the question that a
    # report answers, method by method.
    frame["p_holm"] = frame.groupby("method").p_value.transform(metrics.holm)
    is_significant = frame.p_holm < metrics.SIGNIFICANCE
    frame["direction"] = np.where(is_significant, np.sign(frame.gain), 0)
    return frame


def _cell(method: str, task: str, records_by_cell: Cells) -> dict[str, Any]:
    """A method's figures on a task, before any correction."""
    records = records_by_cell[method, task]
    no_records = records.head(0)
    baseline = records_by_cell.get((BASELINE, task), no_records)
    # The baseline's gain over itself says nothing.
    if method == BASELINE:
        baseline = no_records
    gain = metrics.difference(records, baseline)
    changes_by_seed = metrics.paired(records, baseline).groupby("seed").change
    # The same generator for every cell: a report made again of the same records says the same.
    macro_f1 = metrics.macro_f1(records, np.random.default_rng(0))
    is_readable = records.n_options.max() <= MOST_OPTIONS
    return {
        "kind": "task",
        "name": task,
        "method": method,
        **metrics.accuracy(records).columns("accuracy"),
        **gain.columns("gain"),
        "p_value": metrics.mcnemar(records, baseline) if gain.n else np.nan,
        **macro_f1.columns("macro_f1"),
        "is_above_chance": metrics.is_above_chance(records),
        # The median: a slow first batch or other work on the machine would carry a mean.
        "seconds": records.seconds.median(),
        "n_tokens": records.n_tokens.mean(),
        "by_seed": records.groupby("seed").right.mean().tolist(),
        "gain_by_seed": changes_by_seed.mean().to_dict(),
        "confusion": metrics.confusion(records).tolist() if is_readable else [],
    }


def _means(cells: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Each method's means over the groups of which it has tasks.

    A mean gain is over the tasks that are shared with the baseline.
    """
    means = []
    for method, method_cells in cells.groupby("method", sort=False):
        for group, tasks in groups.items():
            members = method_cells.set_index("name").reindex(tasks)
            mean = {
                "kind": "mean",
                "name": group,
                "method": method,
                "gain_by_seed": _mean_by_seed(members.gain_by_seed),
                **metrics.mean(members, "accuracy").columns("accuracy"),
                **metrics.mean(members, "gain").columns("gain"),
            }
            means.append(mean)
    return pd.DataFrame(means).query("accuracy_n > 0")


def _mean_by_seed(gains_by_seed: pd.Series) -> dict[int, float]:
    """Each seed's mean over tasks, of the seeds that all of them have: others are no comparison."""
    compared = [gains for gains in gains_by_seed.dropna() if gains]
    return pd.DataFrame(compared).dropna(axis=1).mean().to_dict()


def _methods(cells: pd.DataFrame) -> list[Method]:
    """The methods that have records, in the order of the cells."""
    by_method = cells.groupby("method", sort=False)
    return [_method(str(name), method_cells) for name, method_cells in by_method]


def _method(name: str, cells: pd.DataFrame) -> Method:
    return Method(
        name=name,
        seconds=float(cells.seconds.mean()),
        n_tokens=float(cells.n_tokens.mean()),
        n_compared=int(cells.gain.count()),
        n_collapsed=int((cells.gain < 0).sum()),
        n_collapsed_significantly=int((cells.direction < 0).sum()),
    )


def _rivals(headline: str | None, records_by_cell: Cells) -> dict[str, metrics.Estimate]:
    """By method its mean lead over the headline, in the order of the records."""
    if headline is None:
        return {}
    leads_by_method: dict[str, list[dict[str, float]]] = {}
    for (method, task), records in records_by_cell.items():
        headline_records = records_by_cell.get((headline, task))
        if headline_records is None or method in (headline, BASELINE):
            continue
        lead = metrics.difference(records, headline_records)
        # Without a common item there is no lead.
        if lead.n:
            leads_by_method.setdefault(method, []).append(lead.columns("lead"))
    mean_leads = {}
    for method, leads in leads_by_method.items():
        mean_leads[method] = metrics.mean(pd.DataFrame(leads), "lead")
    return mean_leads
