"""The last lines of a fit: what was learned, what it does on held-back rows, and what is next."""

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from icrouting.cli.loading import console
from icrouting.config import FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.items import within
from icrouting.evaluation.records import BASELINE, Record
from icrouting.fitting.account import Account
from icrouting.fitting.rows import rows_to_learn_from
from icrouting.methods.registry import make
from icrouting.methods.settings import Settings
from icrouting.report import metrics
from icrouting.report.leads import lead
from icrouting.runtime.pages import counted, points
from icrouting.runtime.processes import alone, is_first, wait
from icrouting.tasks.task import Task

ROUTED = "icr"


def show(
    out: Path, decoder: Decoder, sources: Sequence[Task], config: FitConfig, n_check: int
) -> None:
    """Prints how a fit went; asks the model and the router `n_check` test rows a task."""
    lines = [learned_from(sources, config)]
    account = Account.of(out / "fit")
    if account is not None:
        lines.append(account.in_words())
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if n_check:
        if is_first():
            # The others have nothing to do by now; the model is whole in each process.
            with alone():
                answers = _answers(out, decoder, sources, n_check)
            _show_answers(answers)
        wait()


def learned_from(sources: Sequence[Task], config: FitConfig) -> str:
    """Returns from how many rows of each task a router learned, and how many were left out."""
    phrases = []
    for task in sources:
        rows = rows_to_learn_from(task, sources, config)
        n_learned = min(config.n_queries, len(rows))
        number = f"{n_learned:,}"
        if n_learned < len(rows):
            number += f" of {len(rows):,}"
        phrase = f"{number} rows of {task.name}"
        if task.n_dropped:
            phrase += f" ({task.n_dropped} more repeat these or held-back rows)"
        phrases.append(phrase)
    return f"learned from {', '.join(phrases)}"


def next_commands(out: Path, model: Backbone, asked: Sequence[str]) -> list[str]:
    """Returns the commands that measure a router on its tasks, and that answer a file of rows.

    Args:
        out: the router's folder.
        model: as the fit was told.
        asked: the words that named data and tasks.
    """
    where = ["--model", model.name] if model.model else []
    measured = ["icr", "eval", "--router", str(out), *where, *asked, "--out", f"{out}-eval"]
    answered = ["icr", "predict", str(out), "rows.csv", *where, "--out", "answers.csv"]
    return [shlex.join(measured), shlex.join(answered)]


def _answers(
    out: Path, decoder: Decoder, sources: Sequence[Task], n_check: int
) -> dict[str, list[Record]]:
    """Returns what the model answered on test rows, by itself and routed, by the method."""
    tasks = []
    for task in sources:
        # As in an evaluation, rows that no model could read are left out.
        bound_task = task.bound_to(decoder.tokenizer)
        tasks.append(within(bound_task, decoder.tokenizer, decoder.context_length)[0])
    methods = make([BASELINE, ROUTED], Settings(router=str(out)))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "records.jsonl")
        evaluation = Evaluation(decoder, methods, sources, file)
        evaluation.run(tasks, [0], n_check)
        for (_, name), reason in evaluation.refused.items():
            console.print(f"{name} was not asked: {reason}", markup=False)
        answers: dict[str, list[Record]] = {BASELINE: [], ROUTED: []}
        for record in records.read(file):
            answers[record.method].append(record)
    return answers


def _show_answers(answers: dict[str, list[Record]]) -> None:
    """Prints the accuracy of each task before and after, and the mean gain with its interval."""
    names = list(dict.fromkeys(record.task for record in answers[ROUTED]))
    if not names:
        return
    table = Table("task", "held-back rows", "before", "after", "gain, with 95 % interval")
    for name, before, after, gain in _lines(answers, names):
        interval = (
            f"{points(gain.value, True)} ({points(gain.low, True)} to {points(gain.high, True)})"
        )
        table.add_row(name, str(gain.n), points(before), points(after), interval)
    console.print(table)
    if len(names) > 1:
        mean = lead(answers[ROUTED], answers[BASELINE], names)
        console.print(
            f"mean gain over {counted(len(names), 'task')}: {mean['value']:+.1f} "
            f"({mean['low']:+.1f} to {mean['high']:+.1f})",
            markup=False,
            highlight=False,
        )


def _lines(
    answers: dict[str, list[Record]], names: Sequence[str]
) -> Iterator[tuple[str, float, float, metrics.Estimate]]:
    """Yields each task's accuracy without and with routing, and the paired difference."""
    for name in names:
        before = metrics.frame(record for record in answers[BASELINE] if record.task == name)
        after = metrics.frame(record for record in answers[ROUTED] if record.task == name)
        gain = metrics.difference(after, before)
        yield name, float(before.right.mean()), float(after.right.mean()), gain
