"""What `icr compare` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from icrouting.cli.loading import console, load, load_tasks, stoppable
from icrouting.comparing import wording
from icrouting.comparing.comparison import Comparison, asked
from icrouting.comparing.comparison import compare as compare_methods
from icrouting.decoder.backbone import Backbone
from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.methods import Settings
from icrouting.tasks.labels import options_of
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


def read_task(
    data: Path | None,
    template: str | None,
    label: str,
    options: Sequence[str],
    test: Path | None,
    split: float,
    seed: int,
    task: str | None,
) -> Task:
    """Returns the task that the arguments describe: a table's, or a task file's.

    Raises:
        ValueError: neither or both are given, or the rows do not fit.
    """
    if task is not None:
        if data is not None or template is not None or options or test is not None:
            raise ValueError(
                "--task names a task file, which says all of it: leave out --data, --template, "
                "--options and --test"
            )
        (loaded,) = load_tasks([task], "")
        return loaded
    if data is None or template is None:
        raise ValueError(
            "give a table with --data and --template, or a task file with --task, as in: "
            "icr compare --data tickets.csv --template 'Ticket: {text}\\nTeam:' --label team"
        )
    template = template.replace("\\n", "\n")
    listed = list(options)
    # Where rows bring their choices, the options are letters.
    has_choices = "{choices}" in template
    if not listed and not has_choices:
        options = options_of(data, template, label)
    loaded = Task.from_rows(
        data,
        template,
        options,
        label=label,
        name=data.stem,
        test=test,
        split=split,
        seed=seed,
        # What is read off the column is the labels' text.
        labels=None if listed or has_choices else "text",
    )
    if loaded.n_dropped:
        console.print(
            f"training rows left out, as they repeat each other or held-back rows: "
            f"{loaded.n_dropped}",
            markup=False,
        )
    return loaded


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
