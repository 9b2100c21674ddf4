"""What `icr report` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from icrouting.cli.reading import console
from icrouting.evaluation import answers
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.runs import command, commit
from icrouting.icr import InContextRouter
from icrouting.report import beyond, leads, page, table
from icrouting.report.calibrated import Way
from icrouting.report.run import Run
from icrouting.routing.card import with_results
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import save_json, save_text


def report(
    runs: Sequence[Path],
    *,
    card: Path | None,
    keep_answers: Path | None,
    restore_to: Path | None,
    calibration: Way | None = None,
    pairs: Sequence[str] | None,
    without: Sequence[str],
    out: Path | None,
) -> None:
    """Shows one run's report, or the leads of methods across runs.

    Raises:
        ValueError: The arguments do not go together, or a file would be overwritten.
    """
    if not runs:
        raise ValueError("no run: give a run's folder, as in `icr report runs/first`")
    others = (card, keep_answers, restore_to, calibration)
    if pairs is not None:
        if any(other is not None for other in others):
            raise ValueError(
                "--leads goes with none of --card, --keep-answers, --restore-to, --calibrate"
            )
        return show_leads(runs, pairs, without, out)
    if without or out is not None:
        raise ValueError("--without and --out are options of --leads: add it")
    if len(runs) > 1:
        raise ValueError("several runs have no common report: give one, or add --leads")
    (run,) = runs
    if restore_to is not None:
        answers.restore(run, restore_to)
        console.print(f"run: {restore_to}", soft_wrap=True, markup=False)
        run = restore_to
    if keep_answers is not None:
        file = answers.keep(run, keep_answers, command())
        console.print(f"answers: {file}", soft_wrap=True, markup=False)
    show(run, card, calibration=calibration)


def show_leads(
    runs: Sequence[Path], pairs: Sequence[str], without: Sequence[str], out: Path | None
) -> None:
    """Prints leads across runs, one a line, and writes them to a JSON file where one is named."""
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already: delete it or give another file")
    with spinner("pairing records"):
        leads_by_name = leads.leads(runs, pairs, without)
    for name, points in leads_by_name.items():
        console.print(leads.in_words(name, points), soft_wrap=True, markup=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_json(out, {"command": command(), "commit": commit(), "leads": leads_by_name})
        console.print(f"leads: {out}", soft_wrap=True, markup=False)


def show(run: Path, card: Path | None = None, *, calibration: Way | None = None) -> None:
    """Remakes a run's report and prints its table and its conclusion.

    Both are written to the card in the folder of a router too, if one is named. With a calibration
    there is a second table, of what methods add to it.
    """
    folder = RunFolder(run)
    with spinner("making the report"):
        report = page.write(run, calibration)
    if card is not None:
        _write_to_card(card, report.run, folder)
    console.print(table.terminal_table(report.summary, console.width))
    if report.calibrated is not None:
        lines = beyond.lines(report.summary, report.calibrated)
        console.print(table.terminal_lines(lines, console.width, beyond.TITLE, beyond.LEGEND))
    console.print(Panel(Text(report.conclusion), title="in short"))
    console.print(f"report: {folder.html}", soft_wrap=True, markup=False)


def _write_to_card(card: Path, run: Run, folder: RunFolder) -> None:
    """Writes a run's report to the card of the router that it measured; ValueError for another."""
    icr = InContextRouter.from_pretrained(card)
    # Attached at its own strength; a run says otherwise beside the digest.
    if icr.digest() not in (run.router, *run.routers.values()):
        held = f"{card} holds {icr.digest()}"
        raise ValueError(f"{folder} measured router {run.router}, {held}: nothing is recorded")
    _check_roles(run, icr, folder)
    # Writes the card anew where it was deleted, and keeps one that is there.
    icr.save_pretrained(card)
    file = card / "README.md"
    text = file.read_text(encoding="utf-8")
    results = folder.markdown.read_text(encoding="utf-8")
    save_text(file, with_results(text, results))


def _check_roles(run: Run, icr: InContextRouter, folder: RunFolder) -> None:
    """ValueError where a run takes a task for unseen that its router learned from, or otherwise."""
    fitted = icr.description.tasks
    for task in run.tasks:
        role = "source" if task.name in fitted else "unseen"
        # A router without names says nothing.
        if fitted and task.role != role:
            raise ValueError(
                f"{folder} counts {task.name} as {task.role}, but the router was fitted on "
                f"{', '.join(fitted)}: nothing is recorded; evaluate it anew"
            )
