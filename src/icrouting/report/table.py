"""Table: a summary's figures by task and method, as text, for the terminal and as CSV."""

import itertools
from collections.abc import Iterator, Sequence
from math import isnan
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from icrouting.evaluation.records import BASELINE
from icrouting.report.rows import Row
from icrouting.report.run import FitCost
from icrouting.report.summary import Method, Summary
from icrouting.report.wording import label
from icrouting.runtime.pages import points

ABOVE = "▲"
BELOW = "▼"
AT_CHANCE = "≈"
NONE = "\N{EN DASH}"
LEGEND = (
    f"{ABOVE} {BELOW} significantly above or below {BASELINE} (McNemar's exact test, "
    "Holm-corrected over a method's tasks, p < 0.05). "
    f"{AT_CHANCE} not significantly above chance (one-sided binomial test)."
)
DRAWS = (
    "Intervals and tests are over items, for the draws that were made. How draws differ is in the "
    "gains by seed; a method that is missing there answers all seeds alike, by one fit or none, or "
    "has had one so far."
)
EARLIER_FITS = (
    "ICR's is the fit of its router, before this run: reckoned from its settings; its time is not "
    "known."
)
# A table of more methods is too wide for columns: it has a line a method.
WIDE = 7
CSV_COLUMNS = (
    *("kind", "name", "method", "n"),
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("gain", "gain_low", "gain_high", "p_value", "p_holm"),
    *("macro_f1", "macro_f1_low", "macro_f1_high"),
    *("is_above_chance", "seconds", "n_tokens", "by_seed"),
)


def marks(cell: Any) -> str:
    """Returns the marks of `LEGEND` that a method has earned on a task."""
    mark_by_direction = {1: ABOVE, -1: BELOW, 0: ""}
    chance_mark = "" if cell.is_above_chance else AT_CHANCE
    return mark_by_direction[cell.direction] + chance_mark


def collapse(method: Method) -> str:
    """Returns on how many tasks a method is below the baseline, and on how many significantly."""
    if not method.n_compared:
        return NONE
    return f"{method.n_collapsed} ({method.n_collapsed_significantly} sig.)"


def milliseconds(seconds: float) -> str:
    """Returns a time in ms, or a dash where none was measured."""
    return NONE if isnan(seconds) else f"{1000 * seconds:.1f}"


def fit_seconds(fit: FitCost) -> str:
    """Returns the time of a fit, or a dash where it is not known."""
    return NONE if fit.seconds is None else f"{fit.seconds:,.1f}"


def has_earlier_fits(fits: Sequence[FitCost]) -> bool:
    """Returns whether any fits were there before the run."""
    return any(fit.seconds is None for fit in fits)


def seeds(summary: Summary) -> list[list[str]]:
    """Returns each seed's mean gain of the methods that seeds move, under a heading.

    Empty where seeds move no method.
    """
    mean_rows = [row for row in summary.rows if row.kind == "mean"]
    lines = []
    for method in summary.methods:
        gains_by_group = [_seed_gains(summary, row.name, method.name) for row in mean_rows]
        if any(len(set(gains)) > 1 for gains in gains_by_group):
            texts = [_signed(gains) for gains in gains_by_group]
            lines.append([label(method.name), *texts])
    if not lines:
        return []
    heading = ["gain by seed", *(row.title for row in mean_rows)]
    return [heading, *lines]


def _seed_gains(summary: Summary, group: str, method: str) -> list[float]:
    mean = summary.line("mean", group, method)
    return [] if mean is None else list(mean.gain_by_seed.values())


def _signed(gains: Sequence[float]) -> str:
    return " ".join(points(gain, is_signed=True) for gain in gains) or NONE


def grid(summary: Summary, methods: Sequence[Method]) -> list[list[str]]:
    """Returns the table as text: a heading, a line a task and mean, then collapse and cost."""
    lines = [["task", *(label(method.name) for method in methods), "chance", "majority"]]
    for row in summary.rows:
        cells = [summary.line(row.kind, row.name, method.name) for method in methods]
        texts = [_text(row, cell) for cell in cells]
        lines.append([row.title, *texts, points(row.chance), points(row.majority)])
    costs = {
        f"below {BASELINE}": [collapse(method) for method in methods],
        "ms per example": [milliseconds(method.seconds) for method in methods],
        "tokens per example": [f"{method.n_tokens:.0f}" for method in methods],
    }
    for title, texts in costs.items():
        # Guessing costs nothing, so the columns of levels stay empty.
        lines.append([title, *texts, "", ""])
    return lines


def grids(summary: Summary) -> list[list[list[str]]]:
    """Returns the table as it is shown, in one part or two.

    Up to `WIDE` methods it is whole. With more it has a line a method, in two parts: the means
    with the costs, then the tasks.
    """
    if len(summary.methods) <= WIDE:
        return [grid(summary, summary.methods)]
    heading, *lines = grid(summary, ranked(summary))
    methods = ["method", *heading[1:]]
    mean_lines = [methods]
    task_lines = [methods]
    # The lines of costs come after those of all rows, so they have no row.
    for line, row in itertools.zip_longest(lines, summary.rows):
        is_task = row is not None and row.kind == "task"
        if is_task:
            task_lines.append(line)
        else:
            mean_lines.append(line)
    return [_turned(mean_lines), _turned(task_lines)]


def _turned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lines as columns."""
    return [list(column) for column in zip(*lines, strict=True)]


def ranked(summary: Summary) -> list[Method]:
    """Returns the methods by their mean accuracy over all tasks, best first.

    Those that lack tasks come last: their means are over other tasks.
    """

    def rank(method: Method) -> tuple[int, float]:
        mean = summary.line("mean", "all", method.name)
        return -int(mean.accuracy_n), -mean.accuracy

    return sorted(summary.methods, key=rank)


def terminal_table(summary: Summary, width: int) -> Group:
    """Returns the table for a terminal `width` characters wide, with what was cut short under it.

    Where it has no room it comes in parts, whose columns stand one under the other: no word breaks.
    """
    mean_titles = {row.title for row in summary.rows if row.kind == "mean"}
    tables = []
    for lines in grids(summary):
        tables += [_terminal_part(part, mean_titles) for part in _parts_within(width, lines)]
    return Group(*tables, Text("\n".join([LEGEND, *footnotes(summary)])))


def terminal_lines(lines: Sequence[Sequence[str]], width: int, title: str, legend: str) -> Group:
    """Returns a table of texts, the first line its heading, in parts that are no wider."""
    tables = [_terminal_part(part, set(), title) for part in _parts_within(width, lines)]
    return Group(*tables, Text(legend))


def _parts_within(width: int, lines: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """Yields a table in parts that are no wider, each with the titles of its lines."""
    titles, *columns = _turned(lines)
    part = [titles]
    for column in columns:
        if len(part) > 1 and _width_of([*part, column]) > width:
            yield _turned(part)
            part = [titles]
        part.append(column)
    yield _turned(part)


def _width_of(columns: Sequence[Sequence[str]]) -> int:
    """How wide a table is whose cells have one line each; each has a rule and two spaces."""
    return 1 + sum(max(map(cell_len, column)) + 3 for column in columns)


def _terminal_part(
    lines: Sequence[Sequence[str]],
    mean_titles: set[str],
    title: str = "Accuracy, % (± half of the 95 % interval)",
) -> Table:
    """One part of the table, its means in bold."""
    table = Table(title=title)
    heading, *body = lines
    # Text, because square brackets in a plain string are rich's markup.
    for place, name in enumerate(heading):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for line in body:
        is_mean = line[0] in mean_titles
        texts = [Text(text) for text in line]
        table.add_row(*texts, style="bold" if is_mean else None, end_section=is_mean)
    return table


def csv(summary: Summary) -> str:
    """Returns every cell and mean as a line of figures, fractions unrounded."""

    def joined(shares: Sequence[float]) -> str:
        return " ".join(str(share) for share in shares)

    # A mean has no accuracies by seed.
    by_seed = summary.lines.by_seed.map(joined, na_action="ignore")
    lines = summary.lines.assign(n=summary.lines.accuracy_n, by_seed=by_seed).reset_index()
    return lines.to_csv(columns=CSV_COLUMNS, index=False, lineterminator="\n")


def footnotes(summary: Summary) -> Sequence[str]:
    """Returns what the run lacks or cut short, for a place next to the table."""
    lacks = [f"Not complete: {line}." for line in summary.unfinished]
    return (*lacks, *summary.notes)


def _text(row: Row, line: Any) -> str:
    """A method's accuracy on a task or group, with its marks or its gain."""
    if line is None:
        return NONE
    half_width = (line.accuracy_high - line.accuracy_low) / 2
    text = f"{points(line.accuracy)} ±{points(half_width)}"
    if row.kind == "task":
        return text + marks(line)
    if line.gain_n:
        text += f" ({points(line.gain, is_signed=True)})"
    if line.accuracy_n < row.n_tasks:
        text += f", {line.accuracy_n} of {row.n_tasks} tasks"
    return text
