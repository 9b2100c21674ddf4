"""Table: a summary's figures by task and method, for the terminal, as Markdown and as CSV."""

import csv as csv_files
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

import numpy as np
from rich.table import Table
from rich.text import Text

from icrouting.conclusion import conclusion, label, points
from icrouting.metrics import Estimate
from icrouting.summary import BASELINE, Cell, GroupMean, MethodLine, Summary

ABOVE, BELOW, AT_CHANCE, NONE = "▲", "▼", "≈", "\N{EN DASH}"
LEGEND = (
    f"{ABOVE} {BELOW} significantly above or below {BASELINE} (McNemar's exact test, Holm-corrected over a "
    f"method's tasks, p < 0.05). {AT_CHANCE} not significantly above chance (one-sided binomial test)."
)
CSV_COLUMNS = (
    *("kind", "name", "method", "n", "accuracy", "accuracy_low", "accuracy_high"),
    *("gain", "gain_low", "gain_high", "p_value", "p_holm", "macro_f1", "macro_f1_low", "macro_f1_high"),
    *("is_above_chance", "seconds", "n_tokens", "by_seed"),
)


@dataclass(frozen=True)
class Row:
    """A line of the table: the `cells` of a task or the `means` of a group, one per method, the other one empty."""

    title: str
    section: str
    cells: tuple[Cell | None, ...]
    means: tuple[GroupMean | None, ...]
    n_tasks: int
    chance: float
    majority: float


def rows(summary: Summary) -> list[Row]:
    """Returns each section's tasks and their mean, then the means over the unseen and over all tasks."""
    methods = [method.name for method in summary.methods]
    found = []
    for group in summary.distinct_groups:
        tasks = [task for task in summary.tasks if task.name in summary.groups[group]]
        members = [task for task in tasks if task.section == group]
        for task in members:
            cells = tuple(summary.cell(method, task.name) for method in methods)
            found.append(Row(task.name, group, cells, (), 1, task.chance, task.majority))
        if tasks:
            means = tuple(summary.mean(method, group) for method in methods)
            chance = float(np.mean([task.chance for task in tasks]))
            majority = float(np.mean([task.majority for task in tasks]))
            section, n_tasks = group if members else "", len(summary.groups[group])
            found.append(Row(f"mean {group}", section, (), means, n_tasks, chance, majority))
    return found


def marks(cell: Cell) -> str:
    """Returns the marks of `LEGEND` that a cell has earned."""
    direction = cell.gain.direction if cell.gain else 0
    return {1: ABOVE, -1: BELOW, 0: ""}[direction] + ("" if cell.is_above_chance else AT_CHANCE)


def collapse(method: MethodLine) -> str:
    """Returns on how many tasks a method is below the baseline, and on how many significantly."""
    if method.n_collapsed is None:
        return NONE
    return f"{method.n_collapsed} ({method.n_collapsed_significantly} sig.)"


def grid(summary: Summary) -> list[list[str]]:
    """Returns the table as text: a heading, a line a task and mean, then collapse and cost."""
    lines = [["task", *(label(method.name) for method in summary.methods), "chance", "majority"]]
    for row in rows(summary):
        texts = [*map(_cell_text, row.cells), *(_mean_text(mean, row.n_tasks) for mean in row.means)]
        lines.append([row.title, *texts, points(row.chance), points(row.majority)])
    costs = {
        f"below {BASELINE}": [collapse(method) for method in summary.methods],
        "ms per example": [f"{1000 * method.seconds:.1f}" for method in summary.methods],
        "tokens per example": [f"{method.n_tokens:.0f}" for method in summary.methods],
    }
    return [*lines, *([title, *texts, "", ""] for title, texts in costs.items())]


def terminal_table(summary: Summary) -> Table:
    """Returns the table for a terminal, with what was cut short under it."""
    # as Text, because square brackets in a plain string are rich's markup
    heading, *lines = ([Text(cell) for cell in line] for line in grid(summary))
    caption = Text("\n".join([LEGEND, *footnotes(summary)]))
    table = Table(title="Accuracy, % (± half of the 95 % interval)", caption=caption, caption_justify="left")
    for place, title in enumerate(heading):
        table.add_column(title, justify="right" if place else "left")
    for line, row in itertools.zip_longest(lines, rows(summary)):
        is_mean = bool(row and row.means)
        table.add_row(*line, style="bold" if is_mean else None, end_section=is_mean)
    return table


def markdown(summary: Summary) -> str:
    """Returns the conclusion, the table, its legend, what was cut short and where the figures come from."""
    heading, *lines = ([cell.replace("|", "\\|") for cell in line] for line in grid(summary))
    rule = ["---", *["---:"] * (len(heading) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [heading, rule, *lines])
    listed = "\n".join(f"- {note}" for note in [LEGEND, *footnotes(summary), summary.origin])
    title = "Accuracy in %, ± half of the 95 % interval; means: the paired gain in brackets."
    return f"{conclusion(summary)}\n\n{title}\n\n{table}\n\n{listed}\n"


def csv(summary: Summary) -> str:
    """Returns every cell and mean as a line of figures, fractions unrounded."""
    buffer = StringIO()
    out = csv_files.writer(buffer, lineterminator="\n")
    out.writerow(CSV_COLUMNS)
    for cell in summary.cells:
        gain = cell.gain
        tests = (gain.p_value, gain.p_holm) if gain else ("", "")
        costs = (cell.is_above_chance, cell.seconds, cell.n_tokens, " ".join(map(str, cell.by_seed)))
        figures = (*_ends(cell.accuracy), *_ends(gain and gain.change), *tests, *_ends(cell.macro_f1), *costs)
        out.writerow(["task", cell.task, cell.method, cell.accuracy.n, *figures])
    for mean in summary.means:
        figures = (*_ends(mean.accuracy), *_ends(mean.gain))
        out.writerow(["mean", mean.group, mean.method, mean.accuracy.n, *figures, *[""] * 9])
    return buffer.getvalue()


def footnotes(summary: Summary) -> Sequence[str]:
    """Returns what the run lacks or cut short, for a place next to the table."""
    return (*(f"Not complete: {line}." for line in summary.unfinished), *summary.notes)


def _cell_text(cell: Cell | None) -> str:
    return f"{_plus_minus(cell.accuracy)}{marks(cell)}" if cell else NONE


def _mean_text(mean: GroupMean | None, n_tasks: int) -> str:
    if mean is None:
        return NONE
    gain = f" ({points(mean.gain.value, is_signed=True)})" if mean.gain else ""
    partial = f", {mean.accuracy.n} of {n_tasks} tasks" if mean.accuracy.n < n_tasks else ""
    return f"{_plus_minus(mean.accuracy)}{gain}{partial}"


def _plus_minus(estimate: Estimate) -> str:
    return f"{points(estimate.value)} ±{points((estimate.high - estimate.low) / 2)}"


def _ends(estimate: Estimate | None) -> tuple[float | str, ...]:
    return (estimate.value, estimate.low, estimate.high) if estimate else ("", "", "")
