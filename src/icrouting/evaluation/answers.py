"""Answers: what every method of a run chose, in one small file, and the run made of it again.

A restored run is what `icr eval` goes on with (more seeds, more methods), `icr report` shows and
leads are paired from. Accuracies, gains and tests come out as they were. Logits come back to three
decimals, or as NaN where the file has none; seconds and tokens are a cell's median and mean. A run
that goes on knows what its new fits cost, not the old.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.records import Record
from icrouting.evaluation.runs import commit
from icrouting.runtime.checks import in_words, known
from icrouting.runtime.storage import load_json, save_json

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
UNANSWERED = "."


@dataclass(frozen=True)
class KeptTask:
    """A task's items, in the order in which every cell holds its answers.

    `items` are their positions in the test split, with spaces between them. `labels` and
    `n_options` have one digit an item: the right option and the number of options. Where an item
    has more options than digits count, they have a number an item, with spaces between them.
    """

    items: str
    labels: str
    n_options: str


@dataclass(frozen=True)
class KeptCell:
    """What one method answered on one task under one seed.

    `chosen` has one digit an item, or a number as `KeptTask.labels` has: the option, or "." where
    there is no answer yet. `seconds` is the median of the records', `n_tokens` their mean. `logits`
    are the options', to three decimals: spaces between options, commas between items, nothing at an
    item that has none. Files that were written without logits lack the field.
    """

    chosen: str
    seconds: float
    n_tokens: int
    logits: str = ""


@dataclass(frozen=True)
class Answers:
    """The content of answers.json.

    `command` and `commit` are its origin; `tasks` go by name, `answers` by method, task and seed.
    """

    command: str
    commit: str
    tasks: dict[str, KeptTask]
    answers: dict[str, dict[str, dict[int, KeptCell]]]


def keep(run: Path, folder: Path, command: str) -> Path:
    """Writes a run's answers and configuration into a folder; returns the file of answers.

    Args:
        run: The run's folder.
        folder: Where answers.json and config.json go; it is made where there is none.
        command: The command line to be named in the file.

    Raises:
        ValueError: The folder has answers already, or another run's configuration; or the run has
            no records.
    """
    file = folder / "answers.json"
    if file.exists():
        raise ValueError(f"{file} exists already: delete it or give another folder")
    config = RunFolder(run).read_config()
    _check_no_other_run(folder, config)
    run_records = records.read(RunFolder(run).records)
    if not run_records:
        raise ValueError(f"{run} holds no records: there are no answers to keep")
    answers = Answers(command, commit(), *_by_cell(run_records))
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "config.json", config)
    save_json(file, asdict(answers))
    return file


def restore(folder: Path, run: Path) -> None:
    """Makes a run's folder again of the answers and the configuration that `keep` left.

    Args:
        folder: Holds answers.json and config.json.
        run: The folder of the run.

    Raises:
        ValueError: The run's folder holds records or another run; or a file is damaged.
    """
    file = RunFolder(run).records
    # Those of other processes lie beside it.
    if records.read(file):
        raise ValueError(f"{run} holds records already: give a new folder")
    config = RunFolder(folder).read_config()
    _check_no_other_run(run, config)
    restored = read_records(folder / "answers.json")
    run.mkdir(parents=True, exist_ok=True)
    save_json(run / "config.json", config)
    records.append(file, restored)


def read_records(file: Path) -> list[Record]:
    """Returns the records that a file of answers stands for.

    Raises:
        ValueError: The file is damaged; the message names what does not fit.
    """
    content = load_json(file)
    restored = []
    try:
        answers = TypeAdapter(Answers).validate_python(content)
        for method, cells_by_task in answers.answers.items():
            for task_name, cells_by_seed in cells_by_task.items():
                task = known("task", task_name, answers.tasks)
                for seed, cell in cells_by_seed.items():
                    restored += _restored(method, task_name, seed, task, cell)
    except ValidationError as error:
        raise ValueError(f"{file} is damaged: {in_words(error)}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return restored


def _check_no_other_run(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "config.json"
    if file.exists() and load_json(file) != config:
        raise ValueError(f"{file} is another run's already: give another folder")


def _by_cell(
    run_records: Sequence[Record],
) -> tuple[dict[str, KeptTask], dict[str, dict[str, dict[int, KeptCell]]]]:
    """Every task's items, and every cell's answers on them by method, task and seed."""
    items_by_task: dict[str, dict[int, Record]] = {}
    records_by_cell: dict[tuple[str, str, int], dict[int, Record]] = {}
    for record in run_records:
        cell = (record.method, record.task, record.seed)
        items_by_task.setdefault(record.task, {})[record.index] = record
        records_by_cell.setdefault(cell, {})[record.index] = record
    tasks = {name: _kept_task(items) for name, items in items_by_task.items()}
    answers: dict[str, dict[str, dict[int, KeptCell]]] = {}
    for (method, task, seed), records_by_index in records_by_cell.items():
        cells_by_seed = answers.setdefault(method, {}).setdefault(task, {})
        cells_by_seed[seed] = _kept_cell(items_by_task[task], records_by_index)
    return tasks, answers


def _kept_task(items: Mapping[int, Record]) -> KeptTask:
    as_digits = _have_digits(items)
    labels = [record.label for record in items.values()]
    n_options = [len(record.option_logits) for record in items.values()]
    return KeptTask(
        items=" ".join(map(str, items)),
        labels=_numbers_text(labels, as_digits=as_digits),
        n_options=_numbers_text(n_options, as_digits=as_digits),
    )


def _kept_cell(items: Mapping[int, Record], records_by_index: Mapping[int, Record]) -> KeptCell:
    chosen = []
    logits = []
    for index in items:
        record = records_by_index.get(index)
        chosen.append(None if record is None else record.prediction)
        logits.append("" if record is None else _logits_text(record))
    seconds = median(record.seconds for record in records_by_index.values())
    n_tokens = fmean(record.n_tokens for record in records_by_index.values())
    return KeptCell(
        chosen=_numbers_text(chosen, as_digits=_have_digits(items)),
        seconds=round(seconds, 4),
        n_tokens=round(n_tokens),
        logits=",".join(logits) if any(logits) else "",
    )


def _logits_text(record: Record) -> str:
    # A run that was restored from answers without logits has none to keep.
    if any(math.isnan(logit) for logit in record.option_logits):
        return ""
    return " ".join(f"{logit:.3f}" for logit in record.option_logits)


def _have_digits(items: Mapping[int, Record]) -> bool:
    """Whether every item of a task has so few options that a digit counts them."""
    return all(len(record.option_logits) < len(DIGITS) for record in items.values())


def _numbers_text(numbers: Sequence[int | None], *, as_digits: bool) -> str:
    """Numbers as digits in a row, or with spaces between them; None is where none is known."""
    words = []
    for number in numbers:
        if number is None:
            words.append(UNANSWERED)
        else:
            words.append(DIGITS[number] if as_digits else str(number))
    return ("" if as_digits else " ").join(words)


def _numbers(text: str, *, as_digits: bool) -> list[int | None]:
    """What `_numbers_text` made a text of."""
    words = list(text) if as_digits else text.split()
    base = len(DIGITS) if as_digits else 10
    return [None if word == UNANSWERED else int(word, base) for word in words]


def _restored(
    method: str, task_name: str, seed: int, task: KeptTask, cell: KeptCell
) -> Iterator[Record]:
    """The records of one cell."""
    indices = [int(index) for index in task.items.split()]
    logits = cell.logits.split(",") if cell.logits else [""] * len(indices)
    # Numbers of options that no digit counts have two digits or more.
    as_digits = len(task.n_options) == len(indices)
    labels = _numbers(task.labels, as_digits=as_digits)
    n_options = _numbers(task.n_options, as_digits=as_digits)
    chosen = _numbers(cell.chosen, as_digits=as_digits)
    columns = zip(indices, labels, n_options, chosen, logits, strict=True)
    for index, label, n_logits, prediction, numbers in columns:
        if prediction is None:
            continue
        if label is None or n_logits is None:
            raise ValueError(f"item {index} has an answer, and no label or no number of options")
        # The number of options is read off a record's logits, so there must be as many.
        option_logits = tuple(float(number) for number in numbers.split())
        if not option_logits:
            option_logits = (math.nan,) * n_logits
        if len(option_logits) != n_logits:
            raise ValueError(f"{len(option_logits)} logits for the {n_logits} options of {index}")
        yield Record(
            method=method,
            task=task_name,
            seed=seed,
            index=index,
            label=label,
            prediction=prediction,
            option_logits=option_logits,
            n_tokens=cell.n_tokens,
            seconds=cell.seconds,
        )
