"""Table: a summary's figures by task and method, as text, for the terminal and as CSV."""

import itertools
from collections.abc import Sequence
from math import isnan
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from icrouting.evaluation.records import BASELINE
from icrouting.report.rows import Row
from icrouting.report.summary import Method, Summary
from icrouting.report.wording import label
from icrouting.runtime.pages import points

ABOVE, BELOW, AT_CHANCE, NONE = "▲", "▼", "≈", "\N{EN DASH}"
LEGEND = (
    f"{ABOVE} {BELOW} significantly above or below {BASELINE} (McNemar's exact test, Holm-corrected over a "
    f"method's tasks, p < 0.05). {AT_CHANCE} not significantly above chance (one-sided binomial test)."
)
DRAWS = (
    "Intervals and tests are over items, for the draws that were made. How draws differ is in the gains by seed; a "
    "method that is missing there answers all seeds alike, by one fit or none, or has had one so far."
)
WIDE = 7  # methods; more are lines rather than columns
CSV_COLUMNS = (
    *("kind", "name", "method", "n", "accuracy", "accuracy_low", "accuracy_high"),
    *(
        "gain",
        "gain_low",
        "gain_high",
        "p_value",
        "p_holm",
        "macro_f1",
        "macro_f1_low",
        "macro_f1_high",
    ),
    *("is_above_chance", "seconds", "n_tokens", "by_seed"),
)


def marks(cell: Any) -> str:
    """Returns the marks of `LEGEND` that a method has earned on a task."""
    return {1: ABOVE, -1: BELOW, 0: ""}[cell.direction] + (
        "" if cell.is_above_chance else AT_CHANCE
    )


def collapse(method: Method) -> str:
    """Returns on how many tasks a method is below the baseline, and on how many significantly."""
    return (
        f"{method.n_collapsed} ({method.n_collapsed_significantly} sig.)"
        if method.n_compared
        else NONE
    )


def milliseconds(seconds: float) -> str:
    """Returns a time in ms, or a dash where none was measured."""
    return NONE if isnan(seconds) else f"{1000 * seconds:.1f}"


def seeds(summary: Summary) -> list[list[str]]:
    """Returns each seed's mean gain of the methods that seeds move, under a heading; empty where there are none."""
    groups = [row for row in summary.rows if row.kind == "mean"]
    lines = []
    for method in summary.methods:
        found = [summary.line("mean", row.name, method.name) for row in groups]
        gains = [[] if line is None else line.gain_by_seed.values() for line in found]
        if any(len(set(shares)) > 1 for shares in gains):
            texts = [
                " ".join(points(share, is_signed=True) for share in shares) or NONE
                for shares in gains
            ]
            lines.append([label(method.name), *texts])
    return [["gain by seed", *(row.title for row in groups)], *lines] if lines else []


def grid(summary: Summary, methods: Sequence[Method]) -> list[list[str]]:
    """Returns the table as text: a heading, a line a task and mean, then collapse and cost."""
    lines = [["task", *(label(method.name) for method in methods), "chance", "majority"]]
    for row in summary.rows:
        texts = [_text(row, summary.line(row.kind, row.name, method.name)) for method in methods]
        lines.append([row.title, *texts, points(row.chance), points(row.majority)])
    costs = {
        f"below {BASELINE}": [collapse(method) for method in methods],
        "ms per example": [milliseconds(method.seconds) for method in methods],
        "tokens per example": [f"{method.n_tokens:.0f}" for method in methods],
    }
    return [*lines, *([title, *texts, "", ""] for title, texts in costs.items())]


def grids(summary: Summary) -> list[list[list[str]]]:
    """Returns the table as it is shown: whole, or for many methods its means and then its tasks, a line a method."""
    if len(summary.methods) <= WIDE:
        return [grid(summary, summary.methods)]
    (_, *methods), *lines = grid(summary, ranked(summary))
    tasks, others = [["method", *methods]], [["method", *methods]]
    for line, row in itertools.zip_longest(lines, summary.rows):
        (tasks if row is not None and row.kind == "task" else others).append(line)
    return [[list(line) for line in zip(*part, strict=True)] for part in (others, tasks)]


def ranked(summary: Summary) -> list[Method]:
    """Returns the methods by their mean accuracy over all tasks, best first; those that lack tasks come last."""
    means = {method.name: summary.line("mean", "all", method.name) for method in summary.methods}
    return sorted(
        summary.methods,
        key=lambda method: (-means[method.name].accuracy_n, -means[method.name].accuracy),
    )


def terminal_table(summary: Summary) -> Group:
    """Returns the table for a terminal, with what was cut short under it."""
    means, parts = {row.title for row in summary.rows if row.kind == "mean"}, []
    for heading, *lines in grids(summary):
        parts.append(table := Table(title="Accuracy, % (± half of the 95 % interval)"))
        # as Text, because square brackets in a plain string are rich's markup
        for place, title in enumerate(heading):
            table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
        for line in lines:
            is_mean = line[0] in means
            table.add_row(*map(Text, line), style="bold" if is_mean else None, end_section=is_mean)
    return Group(*parts, Text("\n".join([LEGEND, *footnotes(summary)])))


def csv(summary: Summary) -> str:
    """Returns every cell and mean as a line of figures, fractions unrounded."""
    seeds = summary.lines.by_seed.map(lambda shares: " ".join(map(str, shares)), na_action="ignore")
    lines = summary.lines.assign(n=summary.lines.accuracy_n, by_seed=seeds).reset_index()
    return lines.to_csv(columns=CSV_COLUMNS, index=False, lineterminator="\n")


def footnotes(summary: Summary) -> Sequence[str]:
    """Returns what the run lacks or cut short, for a place next to the table."""
    return (*(f"Not complete: {line}." for line in summary.unfinished), *summary.notes)


def _text(row: Row, line: Any) -> str:
    if line is None:
        return NONE
    text = f"{points(line.accuracy)} ±{points((line.accuracy_high - line.accuracy_low) / 2)}"
    if row.kind == "task":
        return f"{text}{marks(line)}"
    gain = f" ({points(line.gain, is_signed=True)})" if line.gain_n else ""
    return f"{text}{gain}{f', {line.accuracy_n} of {row.n_tasks} tasks' if line.accuracy_n < row.n_tasks else ''}"
