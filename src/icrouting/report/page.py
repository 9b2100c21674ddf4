"""Report: a run's figures as one HTML page that needs nothing else, Markdown, CSV and JSON."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.records import BASELINE, Record
from icrouting.report import beyond, figures, table, wording
from icrouting.report.run import Run, read_run
from icrouting.report.summary import MOST_OPTIONS, Summary, summarise
from icrouting.routing.priors import Way
from icrouting.runtime.pages import counted, markdown_cell, points, render
from icrouting.runtime.storage import load_json, read_lines, save_text

_FILTERS = {
    "points": points,
    "label": wording.label,
    "counted": counted,
    "cell": markdown_cell,
    "json": json.dumps,
}


@dataclass(frozen=True)
class Report:
    """A run, its figures, and what they say in a few sentences.

    `calibrated` has the figures of the same answers without the options' priors, where they were
    asked for.
    """

    run: Run
    summary: Summary
    conclusion: str
    calibrated: Summary | None = None


def report_of(run: Run, run_records: Sequence[Record], calibration: Way | None = None) -> Report:
    """Returns what there is to report of a run, finished or in progress."""
    summary = summarise(run_records, run)
    conclusion = wording.conclusion(summary)
    if calibration is None:
        return Report(run, summary, conclusion)
    calibrated = summarise(run_records, run, calibration)
    return Report(run, summary, f"{conclusion} {beyond.conclusion(calibrated)}", calibrated)


def write(run_folder: Path, calibration: Way | None = None) -> Report:
    """Returns a run's report, having written report.html, report.md, report.csv and summary.json.

    Reads config.json and records.jsonl, and where they exist routing.json and training.jsonl. Each
    file is replaced as a whole, so a kill leaves the old one or the new one.

    Args:
        run_folder: the run's.
        calibration: how answers are calibrated for a second table; None makes none.
    """
    folder = RunFolder(run_folder)
    run = read_run(folder)
    report = report_of(run, records.read(folder.records), calibration)
    # All are made before one is written: a report that cannot be made leaves the old one whole.
    texts = {
        folder.summary: figures_as_json(report),
        folder.csv: table.csv(report.summary),
        folder.markdown: markdown(report),
        folder.html: html(report, folder),
    }
    for file, text in texts.items():
        save_text(file, text)
    return report


def figures_as_json(report: Report) -> str:
    """Returns the conclusion and every figure."""
    values = {"conclusion": report.conclusion, **asdict(report.summary)}
    if report.calibrated is not None:
        values["calibrated"] = asdict(report.calibrated)
    return json.dumps(values, indent=1, ensure_ascii=False, default=_objects)


def html(report: Report, folder: RunFolder) -> str:
    """Returns the page: conclusion, table, pictures, configuration; no scripts, nothing fetched."""
    summary = report.summary
    pictures = _pictures(report, folder)
    return render(
        "report/templates/report.html.j2",
        _FILTERS,
        run=report.run,
        summary=summary,
        conclusion=report.conclusion,
        calibrated=report.calibrated,
        beyond=beyond,
        table=table,
        baseline=BASELINE,
        most_options=MOST_OPTIONS,
        pictures={name: _data_uri(svg) for name, svg in pictures.items()},
        routers=_pictures_by_router(report.run, folder),
        confusions={name: _data_uri(svg) for name, svg in _confusions(summary).items()},
    )


def markdown(report: Report) -> str:
    """Returns the conclusion, the table, its legend and notes, the figures' origin and costs."""
    return render(
        "report/templates/report.md.j2",
        _FILTERS,
        run=report.run,
        summary=report.summary,
        conclusion=report.conclusion,
        calibrated=report.calibrated,
        beyond=beyond,
        table=table,
    )


def _objects(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a frame as JSON has them, without what is NaN."""
    # As objects, figures are Python's own numbers, as JSON needs them.
    lines = frame.reset_index().astype(object)
    return [line.dropna().to_dict() for _, line in lines.iterrows()]


def _confusions(summary: Summary) -> dict[str, str]:
    """The confusion matrices of methods that have any: the headline's, the baseline's, others'."""
    ranked = sorted(
        summary.methods,
        key=lambda method: (method.name != summary.headline, method.name != BASELINE),
    )
    pictures = {}
    for method in ranked:
        if any(summary.cells(method.name).confusion):
            pictures[method.name] = figures.confusions(summary, method.name)
    return pictures


def _pictures(report: Report, folder: RunFolder) -> dict[str, str]:
    """The pictures that the run has the figures for, as SVG by name."""
    summary = report.summary
    pictures = {"accuracies": figures.accuracies(summary)}
    # Means over different tasks cannot stand in one picture.
    if figures.complete(summary):
        pictures["costs"] = figures.costs(summary, report.run.n_cached())
    if summary.lines.gain_n.any():
        pictures["gains"] = figures.gains(summary)
    pictures.update(_pictures_of_router(folder.routing, folder.training))
    return pictures


def _pictures_of_router(routing: Path, training: Path) -> dict[str, str]:
    """What a router did and how it was trained, of the files of it that there are."""
    pictures = {}
    if routing.exists():
        pictures.update(_routing_pictures(load_json(routing)))
    steps = read_lines(training, dict)
    if steps:
        pictures["training"] = figures.training(steps)
    return pictures


def _pictures_by_router(run: Run, folder: RunFolder) -> dict[str, dict[str, str]]:
    """The pictures of each router that has a name of its own, as the page shows them."""
    pictures_by_router = {}
    for name in run.routers:
        pictures = _pictures_of_router(folder.routing_of(name), folder.training_of(name))
        if pictures:
            uris = {picture: _data_uri(svg) for picture, svg in pictures.items()}
            pictures_by_router[name] = uris
    return pictures_by_router


def _routing_pictures(routing: Mapping[str, Any]) -> dict[str, str]:
    """What the router did, over all tasks and on each."""
    tasks = routing["tasks"]
    if not tasks:
        return {}
    # All parts have a layer in front, so tasks can be averaged place by place.
    mean = {}
    for part in ("head_gates", "routing_vector_abs"):
        mean[part] = np.mean([task[part] for task in tasks.values()], axis=0)
    return {
        "routing": figures.routing(routing["layers"], {"mean over tasks": mean}),
        "routing_by_task": figures.routing(routing["layers"], tasks),
    }


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
