"""Wording: a comparison's answer in two sentences, its table, and the files that keep both."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from icrouting.comparing.board import Board, Measured, accuracy_text
from icrouting.comparing.recommendation import Recommendation
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.runs import command, commit
from icrouting.report.run import read_run
from icrouting.report.wording import label, span
from icrouting.runtime.pages import counted, markdown_cell, points, render
from icrouting.runtime.storage import save_json, save_text

NONE = "\N{EN DASH}"
HEADING = (
    *("method", "right, %", "points above zero-shot", "rows", "fit, s"),
    *("time", "numbers kept", "it ..."),
)
_PACKAGES = ("icrouting", "torch", "transformers", "scikit-learn")


def answer(board: Board) -> str:
    """Returns the recommendation in two sentences, and a third on what was not run.

    The first says which method and how sure that is; the second what it costs and cannot do.
    """
    sentences = [_which(board), _at_what_cost(board)]
    if board.missed:
        names = [f"{label(name)} (about {seconds:.0f} s)" for name, seconds in board.missed.items()]
        sentences.append(f"Not run, for lack of time: {', '.join(names)}.")
    return " ".join(sentences)


def _which(board: Board) -> str:
    advice = board.recommendation
    line = board.line(advice.method)
    rows = counted(advice.n_rows, "held-back row")
    share = f"{points(line.accuracy.value)} % of {rows}"
    if advice.has_one_label:
        return (
            f"Stay with {advice.baseline}: all {rows} have one label, which tells no method from a "
            "constant answer, so give rows of two labels or more to test on."
        )
    if not advice.is_shown:
        return f"Stay with {advice.baseline}, right on {share}: {_not_shown(advice)}."
    p_value = advice.p_values[advice.method]
    methods = counted(advice.n_tried, "method")
    return (
        f"Use {label(advice.method)}: it is right on {share}, {points(advice.gain.value)} points "
        f"above {advice.baseline} ({span(advice.gain)}; p = {p_value:.2g}, corrected for {methods})"
        f"{_best_clause(advice)}."
    )


def _not_shown(advice: Recommendation) -> str:
    if not advice.n_tried:
        return "nothing else was measured"
    clause = f"nothing tried is shown to be better than {advice.baseline} on {advice.n_rows} rows"
    if advice.rows_to_show is not None:
        gain = f"the largest gain measured, {points(advice.largest_gain)} points"
        largest = f"{gain} by {label(advice.largest)}"
        return f"{clause}; with about {advice.rows_to_show:,} rows {largest}, would show"
    if advice.gain_to_show is not None:
        return f"{clause}, where a gain of {points(advice.gain_to_show)} points would show"
    return f"{clause}, where no gain would show"


def _best_clause(advice: Recommendation) -> str:
    """What is said where a dearer method has more rows right."""
    if advice.best == advice.method or advice.lead.value <= 0:
        return ""
    lead = f"{points(advice.lead.value)} points ahead of it ({span(advice.lead)})"
    return f"; {label(advice.best)}, which costs more, is {lead}, which these rows do not show"


def _at_what_cost(board: Board) -> str:
    line = board.line(board.recommendation.method)
    if line.method == board.recommendation.baseline:
        return f"It keeps nothing beside the model and takes no more time; it {line.limit}."
    time = "was not timed"
    if line.ratio is not None:
        time = f"takes {line.ratio:.2f} times {board.recommendation.baseline}'s time a prompt"
    memory = "nothing"
    if line.n_cached:
        memory = f"{line.n_cached:,} numbers"
    fit = ""
    if line.labelled:
        seconds = "" if line.fit_seconds is None else f" in {line.fit_seconds:.0f} s"
        fit = f", made from {line.labelled:,} labelled rows{seconds}"
    return f"It {time} and keeps {memory} beside the model{fit}; it {line.limit}."


def cells(board: Board) -> list[list[str]]:
    """Returns the table as text, a line a method, without its heading."""
    lines = [_cells_of(line) for line in board.lines]
    blank = [NONE] * (len(HEADING) - 2)
    for name, seconds in board.missed.items():
        lines.append([label(name), *blank, f"was not run: about {seconds:.0f} s would be needed"])
    for name, reason in board.refused.items():
        lines.append([label(name), *blank, f"does not fit: {reason}"])
    return lines


def _cells_of(line: Measured) -> list[str]:
    gain = NONE
    if line.gain is not None:
        ends = f"({points(line.gain.low)} to {points(line.gain.high)})"
        gain = f"{points(line.gain.value, is_signed=True)} {ends}"
    return [
        label(line.method),
        accuracy_text(line.accuracy).replace(" %", ""),
        gain,
        f"{line.labelled:,}",
        NONE if line.fit_seconds is None else f"{line.fit_seconds:,.1f}",
        NONE if line.ratio is None else f"{line.ratio:.2f} x",
        f"{line.n_cached:,}",
        line.limit,
    ]


def shown(board: Board) -> Group:
    """Returns the table for a terminal, and below it what methods cannot do."""
    table = Table(title=f"{board.task}: methods in order of cost", expand=False)
    for place, name in enumerate(HEADING[:-1]):
        table.add_column(name, justify="right" if place else "left", no_wrap=place == 0)
    names_by_limit: dict[str, list[str]] = {}
    for line in cells(board):
        table.add_row(*line[:-1])
        names_by_limit.setdefault(line[-1], []).append(line[0])
    notes = [f"{', '.join(names)}: {limit}" for limit, names in names_by_limit.items()]
    return Group(table, Text("\n".join(notes)))


def write(folder: RunFolder, board: Board, answered: str, winner: Path) -> None:
    """Writes compare.md and compare.json into a run's folder."""
    run = read_run(folder)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = version(package)
    content = {
        "answer": answered,
        "winner": str(winner),
        "command": command(),
        "commit": commit(),
        "seed": run.seeds[0],
        "model": run.model,
        "versions": versions,
        **asdict(board),
    }
    save_json(folder.path / "compare.json", content)
    text = render(
        "comparing/templates/compare.md.j2",
        {"cell": markdown_cell, "points": points},
        board=board,
        answer=answered,
        heading=HEADING,
        lines=_marked(board),
        run=run,
        content=content,
    )
    save_text(folder.path / "compare.md", text)


def _marked(board: Board) -> Sequence[Sequence[str]]:
    """The table's lines, the recommended method in bold."""
    lines = cells(board)
    chosen = label(board.recommendation.method)
    for line in lines:
        if line[0] == chosen:
            line[0] = f"**{chosen}**"
    return lines
