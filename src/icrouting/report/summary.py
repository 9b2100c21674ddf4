"""Summary: everything a report says, as frames of figures, counted from the records and configuration of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from icrouting.evaluation.records import BASELINE, Record
from icrouting.report import metrics
from icrouting.report.run import Run

HEADLINE = "icr"
MOST_OPTIONS = 30  # of which a confusion matrix can be read
ORIGIN = "Model {model}, {dtype}, up to {n_test} items a task, seeds {seeds}, {created}, commit {commit}: {command}"
SECTIONS = {"source": "source", "in-domain": "in-domain, unseen", "near": "near", "far": "far"}

Cells = Mapping[tuple[str, str], pd.DataFrame]


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
    """A method's cost per example, and its collapse count: tasks with a gain below 0 (paper, section 7)."""

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
            `confusion` counts by label (rows) and prediction (of 30 options at most), median `seconds` and mean
            `n_tokens`. `by_seed` is each seed's accuracy, `gain_by_seed` its gain, by seed (of a mean, those of all
            tasks). An estimate `x` has its interval from `x_low` to `x_high`, its n in `x_n` (0: none).
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
    rivals: Mapping[str, metrics.Estimate]
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


def summarise(records: Sequence[Record], run: Run) -> Summary:
    """Returns the figures of a run, finished or in progress."""
    if not records:
        raise ValueError("no records to summarise: the run has not scored an example yet")
    refused, lines = run.refused, metrics.frame(records)
    n_answered = lines.groupby(["method", "task", "seed"]).label.transform("size")
    is_whole = n_answered == n_answered.groupby(lines.task).transform(
        "max"
    )  # of a refused cell, seeds that are
    is_open = pd.MultiIndex.from_arrays([lines.method, lines.task]).isin(
        [tuple(cell[:2]) for cell in refused]
    )
    shown = lines.loc[is_whole | ~is_open]
    by_cell: dict[Any, pd.DataFrame] = dict(iter(shown.groupby(["method", "task"], sort=False)))
    kinds = {task.name: "source" if task.role == "source" else task.group for task in run.tasks}
    sections = {task: SECTIONS.get(kind, kind) for task, kind in kinds.items()}
    if unknown := sorted({task for _, task in by_cell} - set(sections)):
        raise ValueError(f"config.json does not describe the tasks {unknown}, which have records")
    groups = _groups(sections)
    # the levels and the full size of a task are those of the method with the most records
    fullest = {
        task: max((found for (_, of), found in by_cell.items() if of == task), key=len)
        for _, task in by_cell
    }
    methods = list(dict.fromkeys([*run.methods, *(method for method, _ in by_cell)]))
    keys = [
        (method, task) for method in methods for task in groups["all"] if (method, task) in by_cell
    ]
    cells = pd.DataFrame([_cell(*key, by_cell) for key in keys])
    cells["p_holm"] = cells.groupby("method").p_value.transform(metrics.holm)
    cells["direction"] = np.where(cells.p_holm < metrics.SIGNIFICANCE, np.sign(cells.gain), 0)
    others = [method for method in cells.method if method != BASELINE]
    headline = HEADLINE if HEADLINE in others else others[-1] if others else None
    return Summary(
        headline=headline,
        groups=groups,
        methods=[_method(str(name), found) for name, found in cells.groupby("method", sort=False)],
        rows=_rows(groups, sections, fullest),
        lines=pd.concat([cells, _means(cells, groups)]).set_index(["kind", "name", "method"]),
        rivals=_rivals(headline, by_cell),
        unfinished=_unfinished(
            methods, list(sections), by_cell, fullest, {(m, task) for m, task, _ in refused}
        ),
        notes=(
            *run.notes,
            *(f"{m} does not fit {task}: {said}" for m, task, said in refused),
        ),
        origin=ORIGIN.format(
            model=run.model,
            dtype=run.dtype or "dtype not kept",
            n_test=run.n_test,
            seeds=", ".join(map(str, run.seeds)),
            created=run.created,
            commit=run.commit,
            command=run.command,
        ),
    )


def _groups(sections: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Task names by section, and those of the unseen and of all tasks."""
    ranked = sorted(
        dict.fromkeys(sections.values()),
        key=lambda section: (*SECTIONS.values(), section).index(section),
    )
    groups = {
        section: tuple(name for name in sections if sections[name] == section) for section in ranked
    }
    unseen = tuple(name for section in ranked if section != "source" for name in groups[section])
    everything = (*groups.get("source", ()), *unseen)
    return {**groups, **({"unseen": unseen} if unseen else {}), "all": everything}


def _cell(method: str, task: str, by_cell: Cells) -> dict[str, Any]:
    """A method's figures on a task, before any correction."""
    records = by_cell[method, task]
    baseline = (
        records.head(0) if method == BASELINE else by_cell.get((BASELINE, task), records.head(0))
    )
    gain = metrics.difference(records, baseline)
    return {
        **{"kind": "task", "name": task, "method": method},
        **metrics.accuracy(records).columns("accuracy"),
        **gain.columns("gain"),
        "p_value": metrics.mcnemar(records, baseline) if gain.n else np.nan,
        # a fixed generator per cell: a report remade from the same records says the same
        **metrics.macro_f1(records, np.random.default_rng(0)).columns("macro_f1"),
        "is_above_chance": metrics.is_above_chance(records),
        "seconds": records.seconds.median(),
        "n_tokens": records.n_tokens.mean(),
        "by_seed": records.groupby("seed").right.mean().tolist(),
        "gain_by_seed": metrics.paired(records, baseline).groupby("seed").change.mean().to_dict(),
        "confusion": metrics.confusion(records).tolist()
        if records.n_options.max() <= MOST_OPTIONS
        else [],
    }


def _means(cells: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Each method's means over the groups of which it has tasks; the gain's over those shared with the baseline."""
    means = []
    for method, found in cells.groupby("method", sort=False):
        for group, tasks in groups.items():
            members = found.set_index("name").reindex(tasks)
            accuracy, gain = (
                metrics.mean(members, name).columns(name) for name in ("accuracy", "gain")
            )
            by_seed = (
                pd.DataFrame([of for of in members.gain_by_seed.dropna() if of])
                .dropna(axis=1)
                .mean()
                .to_dict()
            )
            means.append(
                {
                    "kind": "mean",
                    "name": group,
                    "method": method,
                    "gain_by_seed": by_seed,
                    **accuracy,
                    **gain,
                }
            )
    return pd.DataFrame(means).query("accuracy_n > 0")


def _method(name: str, cells: pd.DataFrame) -> Method:
    seconds, n_tokens = float(cells.seconds.mean()), float(cells.n_tokens.mean())
    n_collapsed, surely = int((cells.gain < 0).sum()), int((cells.direction < 0).sum())
    return Method(name, seconds, n_tokens, int(cells.gain.count()), n_collapsed, surely)


def _rows(
    groups: Mapping[str, tuple[str, ...]],
    sections: Mapping[str, str],
    fullest: Mapping[str, pd.DataFrame],
) -> list[Row]:
    """The table's lines, without the means of groups that repeat the tasks of an earlier one."""
    levels = {
        task: Row(
            "task",
            task,
            sections[task],
            1,
            most.item.nunique(),
            metrics.chance(most),
            metrics.majority(most),
        )
        for task, most in fullest.items()
    }
    rows, seen = [], set()
    for group, tasks in groups.items():
        scored = [levels[task] for task in tasks if task in levels]
        if scored and tasks not in seen:
            members = [row for row in scored if row.section == group]
            section, n_items = group if members else "", sum(row.n_items for row in scored)
            chance = float(np.mean([row.chance for row in scored]))
            majority = float(np.mean([row.majority for row in scored]))
            rows += [*members, Row("mean", group, section, len(tasks), n_items, chance, majority)]
        seen.add(tasks)
    return rows


def _rivals(headline: str | None, by_cell: Cells) -> dict[str, metrics.Estimate]:
    leads = [
        {"method": method, **metrics.difference(found, by_cell[headline, task]).columns("lead")}
        for (method, task), found in by_cell.items()
        if headline and method not in (headline, BASELINE) and (headline, task) in by_cell
    ]
    compared = pd.DataFrame(leads, columns=["method", "lead", "lead_low", "lead_high"]).dropna()
    return {
        str(method): metrics.mean(found, "lead")
        for method, found in compared.groupby("method", sort=False)
    }


def _unfinished(
    methods: Sequence[str],
    tasks: Sequence[str],
    by_cell: Cells,
    fullest: Mapping[str, pd.DataFrame],
    refused: set[Any],
) -> list[str]:
    """What is missing against the configuration, and against the method with the most records on a task."""
    lines = []
    for method in methods:
        missing = [
            task
            for task in tasks
            if (method, task) not in by_cell and (method, task) not in refused
        ]
        lines += [f"{method}: no records on {', '.join(missing)}"] if missing else []
        found = {
            task: (len(by_cell.get((method, task), ())), len(fullest.get(task, ())))
            for task in tasks
        }
        short = [
            f"{n} of {most} predictions on {task}"
            for task, (n, most) in found.items()
            if 0 < n < most
        ]
        lines += [f"{method}: {', '.join(short)}"] if short else []
    return lines
