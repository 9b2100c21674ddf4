"""What `icr predict` does, once its arguments are parsed."""

import csv
import hashlib
import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.cli.loading import base_of_router, console, load, stoppable
from icrouting.decoder.backbone import Backbone
from icrouting.icr import InContextRouter
from icrouting.methods import saved
from icrouting.routing.likeness import Likeness, UnlikePrompts
from icrouting.routing.ownership import CALIBRATION
from icrouting.routing.predictions import LEFT_ALONE, MALFORMED, Prediction
from icrouting.routing.shipped import TaskCalibration, known_specs, reading_of
from icrouting.runtime.appended import AppendedFile
from icrouting.runtime.memory import give_back
from icrouting.runtime.progress import spinner, track_lines
from icrouting.tasks.rows import unlabelled_fields
from icrouting.tasks.streams import KINDS, Row, Table
from icrouting.tasks.task import Task, TaskSpec, rows_digest, spec_among
from icrouting.tasks.taskfile import read_task_spec

# Rows that are sorted by length, and kept by a kill, together.
WINDOW = 512
ADDED = ("label", "probability", "status")


class Predictor(Protocol):
    """Whatever is attached to a model and answers rows."""

    def predict(self, rows: Any, task: Any) -> list[Prediction]:
        """Returns a prediction for each row."""
        ...


Attach = Callable[
    [PreTrainedModel, PreTrainedTokenizerBase, Task], AbstractContextManager[Predictor]
]


@dataclass(frozen=True)
class Artifact:
    """A router or a saved method, before its model is loaded.

    Attributes:
        model: the model that it is for.
        digest: identifies what it holds.
        specs: how its tasks' rows become prompts.
        attach: attaches it to that model.
        takes_any_task: whether it answers tasks that it was not made for.
        calibrations: the priors that it takes away.
    """

    model: Backbone
    digest: str
    specs: list[TaskSpec]
    attach: Attach
    takes_any_task: bool = False
    calibrations: Sequence[TaskCalibration] = ()


def predict(
    artifact: str,
    rows: Path,
    out: Path,
    model: Backbone,
    task: str | None,
    *,
    gate: bool,
    prefix: str,
) -> None:
    """Writes the answers to all rows of a file, or those that an earlier run did not come to."""
    writer_kind = out.suffix.lower()
    if writer_kind not in KINDS:
        raise ValueError(f"--out must end in one of {', '.join(KINDS)}, got {out}")
    known = _artifact(artifact, model, gate=gate)
    spec = _spec(task, known)
    with spinner(f"reading {rows}"):
        table = Table(rows, tuple(unlabelled_fields(spec)))
        n_rows, headings = table.survey()
        added = [prefix + name for name in ADDED]
        _check_names(rows, headings, added)
        about = {
            "rows": table.digest()[:16],
            "artifact": known.digest,
            "task": rows_digest([Task(spec, (), ())]),
            "gate": str(gate),
            "added": " ".join(added),
        }
    answers = AppendedFile(out, about)
    if known.model.dtype != "auto":
        # Of finished answers no model is loaded, which would say its dtype.
        answers.check({"dtype": known.model.dtype})
    if answers.progress.is_finished:
        _say_summary(answers, spec, None)
        return
    likeness = Likeness([each for each in known.calibrations if each.reading == reading_of(spec)])
    base, tokenizer = load(known.model)
    writer = Writer(writer_kind, table.delimiter() if table.is_table else ",", headings, added)
    started = time.monotonic()
    n_before = answers.progress.n_rows
    about["dtype"] = str(base.dtype).removeprefix("torch.")
    with (
        stoppable(lambda: _kept(answers)),
        answers.opened(about),
        known.attach(base, tokenizer, Task(spec, (), ())) as attached,
    ):
        if not answers.progress.n_bytes:
            answers.append(writer.heading(), 0, {})
        windows = _windows(islice(table.rows(), n_before, None))
        for window in track_lines(windows, "predict", len, "rows", n_rows, n_before):
            with warnings.catch_warnings():
                # Of all windows together, at the end: a file may be sorted.
                warnings.simplefilter("ignore", UnlikePrompts)
                predictions = _answered(attached, spec, table, window)
            likeness.add(predictions)
            piece = b"".join(map(writer.line, window, predictions))
            answers.append(piece, len(window), _counted(answers.progress.counts, predictions))
            # However many rows there are, a job takes as much memory.
            give_back()
        answers.finish()
    n_now = answers.progress.n_rows - n_before
    _say_summary(answers, spec, n_now / (time.monotonic() - started))
    if sentence := likeness.sentence():
        console.print(f"Look out: {sentence}.", soft_wrap=True, markup=False, highlight=False)


def _artifact(name: str, model: Backbone, *, gate: bool) -> Artifact:
    """Returns what a folder or a hub id holds; ValueError where that is nothing that predicts."""
    folder = Path(name)
    if (folder / saved.CONFIG).exists():
        content = saved.read_saved(folder)
        return Artifact(
            model.or_else(content.model),
            _digest(folder / saved.CONFIG),
            content.specs,
            lambda base, tokenizer, task: saved.load_method(folder, base, tokenizer).attached(
                base, tokenizer, task
            ),
        )
    if (folder / "winner.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds a winner that learned nothing and has nothing to attach: ask the "
            "model its prompt, as winner.json has it"
        )
    icr = InContextRouter.from_pretrained(name)
    assert icr.folder is not None, "a router that was loaded has a folder"
    digest = _digest(icr.folder / "config.json")
    if icr.calibrations:
        # Other priors are other answers.
        digest += f"+{_digest(icr.folder / CALIBRATION)}"
    return Artifact(
        base_of_router(model, icr),
        digest,
        known_specs(icr.description.sources or (), icr.calibrations),
        lambda base, tokenizer, task: icr.attached(base, tokenizer, gate=gate),
        takes_any_task=True,
        calibrations=[each for each in icr.calibrations if each.made_of == icr.made_of(icr.gate)],
    )


def router_spec(task: str | None, icr: InContextRouter) -> TaskSpec:
    """Returns how rows read that a router is asked: as a task that it knows, or a task file."""
    if task is not None and task.endswith(".toml"):
        return read_task_spec(Path(task))
    return spec_among(task, known_specs(icr.description.sources or (), icr.calibrations))


def _spec(task: str | None, known: Artifact) -> TaskSpec:
    """Returns how the rows read, which a task file may say."""
    if task is not None and task.endswith(".toml") and (known.takes_any_task or not known.specs):
        return read_task_spec(Path(task))
    return spec_among(task, known.specs)


def _digest(file: Path) -> str:
    # Either file holds the digest of the weights beside it.
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _check_names(rows: Path, headings: Sequence[str], added: Sequence[str]) -> None:
    """ValueError where the rows have a column of a name that is to be added."""
    clashes = [name for name in added if name in headings]
    if clashes:
        raise ValueError(
            f"{rows} has a column {clashes[0]!r} already: say with --prefix what the columns that "
            "are added begin with (--prefix predicted_)"
        )


def _kept(answers: AppendedFile) -> str:
    """What a run that is stopped has kept."""
    n_rows = answers.progress.n_rows
    return f"{answers.file} keeps {n_rows:,} rows; the same command goes on from there"


def _windows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yields rows by windows, the last of which may be shorter."""
    while window := list(islice(rows, WINDOW)):
        yield window


def _answered(
    attached: Predictor, spec: TaskSpec, table: Table, window: Sequence[Row]
) -> list[Prediction]:
    """Returns the predictions of a window's rows; those that could not be read have none."""
    good = [table.asked(row) for row in window if not row.problem]
    answers = iter(attached.predict(good, spec))
    predictions = []
    for row in window:
        if row.problem:
            status = f"{MALFORMED}: {row.place}: {row.problem}"
            predictions.append(Prediction(None, None, status))
        else:
            predictions.append(next(answers))
    return predictions


def _counted(
    counts: dict[str, dict[str, int]], predictions: Sequence[Prediction]
) -> dict[str, dict[str, int]]:
    """Returns how many rows have which status and which label, with further ones."""
    statuses = Counter(counts.get("status", {}))
    labels = Counter(counts.get("label", {}))
    for prediction in predictions:
        # A reason stands behind the colon.
        statuses[prediction.status.partition(":")[0]] += 1
        if prediction.label is not None:
            labels[prediction.label] += 1
    return {"status": dict(statuses), "label": dict(labels)}


@dataclass(frozen=True)
class Writer:
    """Writes rows with their answers.

    Attributes:
        kind: ".csv", ".tsv" or ".jsonl".
        delimiter: what stands between the cells of the rows' own table, for a CSV.
        headings: the rows' columns.
        added: the names of the columns that are added, in the order of ADDED.
    """

    kind: str
    delimiter: str
    headings: list[str]
    added: list[str]

    def heading(self) -> bytes:
        """Returns the first line; JSONL has none."""
        if self.kind == ".jsonl":
            return b""
        return self._table_line([*self.headings, *self.added])

    def line(self, row: Row, prediction: Prediction) -> bytes:
        """Returns a row with its answer."""
        probability = prediction.probability
        if self.kind == ".jsonl":
            rounded = None if probability is None else round(probability, 6)
            values = (prediction.label, rounded, prediction.status)
            content = {**row.cells, **dict(zip(self.added, values, strict=True))}
            return _encoded(json.dumps(content, ensure_ascii=False, default=str) + "\n")
        shown = "" if probability is None else f"{probability:.6f}"
        cells = [_cell(row.cells.get(name)) for name in self.headings]
        return self._table_line([*cells, prediction.label or "", shown, prediction.status])

    def _table_line(self, cells: Sequence[str]) -> bytes:
        text = io.StringIO(newline="")
        delimiter = "\t" if self.kind == ".tsv" else self.delimiter.replace("\t", ",")
        csv.writer(text, delimiter=delimiter).writerow(cells)
        return _encoded(text.getvalue())


def _cell(value: object) -> str:
    """Returns a value as a table's cell: a text as it stands, all else as JSON has it."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _encoded(text: str) -> bytes:
    try:
        # Bytes that were no UTF-8 when they were read.
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Halves of pairs that JSON wrote as such.
        return text.encode("utf-8", "surrogatepass")


def _say_summary(answers: AppendedFile, spec: TaskSpec, rate: float | None) -> None:
    """Prints what the answers are, how fast they came, and what may be done next."""
    counts = answers.progress.counts
    statuses = counts.get("status", {})
    line = f"{answers.file}: {answers.progress.n_rows:,} rows ({_listed(statuses)})"
    if counts.get("label"):
        line += f"; {_listed(counts['label'])}"
    line += "; it was finished before" if rate is None else f"; {rate:,.1f} rows/s"
    console.print(f"{line}. {_next_step(statuses)}", soft_wrap=True, markup=False, highlight=False)


def _listed(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered)


def _next_step(statuses: dict[str, int]) -> str:
    """Says what to look at."""
    n_rows = sum(statuses.values())
    if statuses.get(MALFORMED, 0) * 10 > n_rows:
        return "Next: mend the rows that are malformed, whose status says why."
    if statuses.get(LEFT_ALONE, 0) * 10 > n_rows:
        return (
            "Next: rows left alone are unlike those of the fit, and the base model answered them; "
            "`icr calibrate` corrects its lean without a label, and a fit with such rows teaches "
            "the router."
        )
    return "Next: check the least sure answers by hand, sorted by probability."
