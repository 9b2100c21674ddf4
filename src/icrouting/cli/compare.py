"""What `icr compare` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from icrouting.cli.loading import console, load, stoppable
from icrouting.comparing import wording
from icrouting.comparing.comparison import Comparison, asked
from icrouting.comparing.comparison import compare as compare_methods
from icrouting.decoder.backbone import Backbone
from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.methods import Settings
from icrouting.tasks.task import Task


def compare(
    out: Path,
    task: Task,
    model: Backbone,
    *,
    minutes: float,
    methods: Sequence[str],
    settings: Settings,
    seed: int,
    data: str,
) -> None:
    """Compares methods on one task and prints the table and the recommendation."""
    with stoppable(lambda: _kept(RunFolder(out))):
        # A mistake is told before the model is loaded.
        asked(task, minutes, methods, settings)
        base, tokenizer = load(model)
        n_rows = f"{len(task.train)} training, {len(task.validation)} validation"
        console.print(f"{task.name}: {n_rows} and {len(task.test)} held-back rows", markup=False)
        comparison = compare_methods(
            task,
            base,
            tokenizer,
            out,
            minutes=minutes,
            methods=methods,
            settings=settings,
            seed=seed,
            data=data,
            say=_say,
        )
    show(comparison)


def show(comparison: Comparison) -> None:
    """Prints a comparison's table, its answer, and where the winner lies."""
    folder = RunFolder(comparison.folder)
    console.print(wording.shown(comparison.board))
    console.print(Panel(Text(comparison.answer), title="in short"))
    lines = [
        f"winner: {folder.path / 'winner'}",
        f"table: {folder.path / 'compare.md'}",
        f"report: {folder.html}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _kept(folder: RunFolder) -> str:
    """What a comparison that is stopped has kept."""
    answers = records.read(folder.records)
    if not answers:
        return f"no answer was computed yet that {folder} could keep, the same command begins anew"
    n_methods = len({record.method for record in answers})
    kept = f"{len(answers):,} answers of {n_methods} methods, and their fits"
    return f"{folder} keeps {kept}; the same command goes on from there"
