"""What `icr report` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

from icrouting.cli import evaluate
from icrouting.cli.loading import console
from icrouting.evaluation import answers
from icrouting.evaluation.runs import command, commit
from icrouting.report import leads
from icrouting.report.calibrated import Way
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import save_json


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
    evaluate.show(run, card, calibration=calibration)


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
