"""Table: what a sweep's settings score, and how far each is from the reference, item by item."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import pandas as pd

from icrouting.evaluation.records import Record
from icrouting.report import metrics
from icrouting.report.coverage import Cells, counted
from icrouting.report.metrics import Estimate
from icrouting.report.rows import groups_of, sections_of
from icrouting.report.run import Run
from icrouting.runtime.pages import markdown_cell, points

# What the table shows; its CSV and JSON have the other groups of tasks too.
SHOWN = ("source", "unseen")
SETTING = "setting"
METHOD = "method"
NONE = "\N{EN DASH}"
COLUMNS = (
    *("name", "kind", "group", "n_tasks"),
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("lead", "lead_low", "lead_high", "lead_n"),
)


@dataclass(frozen=True)
class Line:
    """One setting or method on one group of tasks.

    Attributes:
        name: of the setting or the method.
        kind: which of the two it is.
        group: of tasks, as in a report.
        accuracy: mean over the tasks, each of which weighs alike.
        lead: mean over the tasks of the paired difference to the reference; `n` is 0 where there
            is none.
        lead_by_seed: that of each seed, where a setting is fitted for several.
    """

    name: str
    kind: str
    group: str
    accuracy: Estimate
    lead: Estimate
    lead_by_seed: Mapping[int, float]

    def columns(self) -> dict[str, Any]:
        """Returns the line as one of the CSV."""
        return {
            "name": self.name,
            "kind": self.kind,
            "group": self.group,
            "n_tasks": self.accuracy.n,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            **self.lead.columns("lead"),
        }


@dataclass(frozen=True)
class Table:
    """What a sweep comes to.

    Attributes:
        reference: the setting that leads are over.
        groups: names of tasks, by group.
        lines: settings in their order, then methods, each on every group that it has tasks of.
    """

    reference: str
    groups: Mapping[str, tuple[str, ...]]
    lines: Sequence[Line]

    @classmethod
    def of(
        cls,
        run: Run,
        run_records: Iterable[Record],
        settings: Sequence[str],
        reference: str,
        fits: Mapping[str, tuple[str, int]] | None = None,
    ) -> "Table":
        """Returns the table of a run whose routers are the settings.

        Args:
            run: the run.
            run_records: its records.
            settings: their names.
            reference: the name of the one that leads are over.
            fits: of each router, by its name in the run, the setting and the seed of its fit; None
                where routers have the settings' names.
        """
        refused = run.refused
        if fits is not None:
            run_records = _pooled(run_records, fits)
            refused = [(fits.get(name, (name,))[0], *rest) for name, *rest in run.refused]
        cells = counted(metrics.frame(run_records), refused)
        groups = groups_of(sections_of(run.tasks))
        others = [method for method in run.methods if method not in run.routers]
        kinds = dict.fromkeys(settings, SETTING) | dict.fromkeys(others, METHOD)
        lines = []
        for name, kind in kinds.items():
            for group, tasks in groups.items():
                line = _line(name, kind, group, tasks, cells, reference)
                if line.accuracy.n:
                    lines.append(line)
        return cls(reference, groups, lines)

    def line(self, name: str, group: str) -> Line | None:
        """Returns a setting's or method's line; None where it has no task of the group."""
        for line in self.lines:
            if (line.name, line.group) == (name, group):
                return line
        return None

    @property
    def names(self) -> dict[str, str]:
        """The kind of each setting and method, by name, in the table's order."""
        return {line.name: line.kind for line in self.lines}

    @property
    def shown_groups(self) -> list[str]:
        """The groups that the table shows: source and unseen tasks."""
        return [group for group in SHOWN if group in self.groups]

    def csv(self) -> str:
        """Returns every line as figures, fractions unrounded."""
        frame = pd.DataFrame([line.columns() for line in self.lines])
        return frame.to_csv(columns=COLUMNS, index=False, lineterminator="\n")

    def objects(self) -> list[dict[str, Any]]:
        """Returns every line as JSON has it, without what is NaN."""
        lines = []
        for line in self.lines:
            columns = line.columns()
            for name, value in line.columns().items():
                # There is no lead of the reference over itself.
                if isinstance(value, float) and isnan(value):
                    del columns[name]
            columns["lead_by_seed"] = list(line.lead_by_seed.values())
            lines.append(columns)
        return lines

    def grid(self) -> list[list[str]]:
        """Returns the table as text under a heading, a line a setting or method."""
        heading = ["setting"]
        for group in self.shown_groups:
            heading += [f"{group}, %", f"{group}, over reference"]
        lines = [heading]
        for name in self.names:
            texts = [f"{name} (reference)" if name == self.reference else name]
            for group in self.shown_groups:
                texts += self._texts(name, group)
            lines.append(texts)
        return lines

    def _texts(self, name: str, group: str) -> list[str]:
        """A line's accuracy and its lead over the reference, in words."""
        line = self.line(name, group)
        if line is None:
            return [NONE, NONE]
        half_width = (line.accuracy.high - line.accuracy.low) / 2
        accuracy = f"{points(line.accuracy.value)} ±{points(half_width)}"
        n_tasks = len(self.groups[group])
        # A mean over fewer tasks is no comparison with one over all.
        if line.accuracy.n < n_tasks:
            accuracy += f", {line.accuracy.n} of {n_tasks} tasks"
        if name == self.reference or not line.lead.n:
            return [accuracy, NONE]
        by_seed = [points(lead, is_signed=True) for lead in line.lead_by_seed.values()]
        ending = f", by seed {' '.join(by_seed)}" if len(by_seed) > 1 else ""
        return [accuracy, _signed(line.lead) + ending]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        heading, *lines = self.grid()
        rows = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
        return "\n".join(f"| {' | '.join(map(markdown_cell, row))} |" for row in rows)

    def conclusion(self) -> str:
        """Returns in plain English which setting is highest, and whether noise may be all."""
        clauses = []
        for group in self.shown_groups:
            clause = self._clause(group)
            if clause:
                clauses.append(clause)
        return " ".join(clauses)

    def _clause(self, group: str) -> str:
        n_tasks = len(self.groups[group])
        lines = []
        for line in self.lines:
            is_whole = line.accuracy.n == n_tasks
            if line.kind == SETTING and line.group == group and is_whole:
                lines.append(line)
        if len(lines) < 2:
            return ""
        # Of those that are level, the reference: nothing is ahead of it.
        best = max(lines, key=lambda line: (line.accuracy.value, line.name == self.reference))
        if best.name == self.reference:
            return f"On the {group} tasks the reference {best.name} is highest."
        doubt = "; not distinguishable from no difference" if best.lead.low <= 0 else ""
        return (
            f"On the {group} tasks {best.name} is highest, {points(best.lead.value)} points above "
            f"{self.reference} (95 % interval {points(best.lead.low)} to "
            f"{points(best.lead.high)}{doubt})."
        )


def _signed(lead: Estimate) -> str:
    ends = f"{points(lead.low, is_signed=True)} to {points(lead.high, is_signed=True)}"
    return f"{points(lead.value, is_signed=True)} ({ends})"


def _line(
    name: str, kind: str, group: str, tasks: Sequence[str], cells: Cells, reference: str
) -> Line:
    """What a setting or method scores on a group of tasks, and its lead over the reference."""
    accuracies = []
    leads = []
    leads_by_seed = []
    for task in tasks:
        if (name, task) not in cells:
            continue
        records = cells[name, task]
        accuracies.append(metrics.accuracy(records).columns("accuracy"))
        if name != reference and (reference, task) in cells:
            difference = metrics.difference(records, cells[reference, task])
            leads.append(difference.columns("lead"))
            pairs = metrics.paired(records, cells[reference, task])
            leads_by_seed.append(pairs.groupby("seed").change.mean())
    by_seed: dict[int, float] = {}
    if leads_by_seed:
        # A seed that some task lacks has no mean over the tasks.
        by_seed = pd.concat(leads_by_seed, axis=1).dropna().mean(axis=1).to_dict()
    return Line(name, kind, group, _mean(accuracies, "accuracy"), _mean(leads, "lead"), by_seed)


def _pooled(run_records: Iterable[Record], fits: Mapping[str, tuple[str, int]]) -> list[Record]:
    """Records under their settings' names, each seed's those of the fit of that seed."""
    pooled = []
    for record in run_records:
        setting, seed = fits.get(record.method, (record.method, record.seed))
        # A router answers all seeds alike, and so those of other fits, too.
        if record.seed == seed:
            pooled.append(replace(record, method=setting))
    return pooled


def _mean(estimates: Sequence[Mapping[str, float]], name: str) -> Estimate:
    if not estimates:
        return metrics.NOTHING
    return metrics.mean(pd.DataFrame(estimates), name)
