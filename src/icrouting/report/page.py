"""Report: a run folder's figures as one HTML page that needs nothing else, beside Markdown, CSV and JSON."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icrouting.evaluation import records
from icrouting.evaluation.records import BASELINE
from icrouting.report import figures, table, wording
from icrouting.report.summary import MOST_OPTIONS, Summary, summarise
from icrouting.runtime.checks import read
from icrouting.runtime.pages import points, render
from icrouting.runtime.storage import load_json, read_lines, save_text

_FILTERS = {"points": points, "label": wording.label, "json": json.dumps}


@dataclass(frozen=True)
class _Task:
    name: str
    group: str
    role: str
    n_options: int


@dataclass(frozen=True)
class _Shown:
    """What a report shows of config.json; what else is there is listed as it stands."""

    command: str
    commit: str
    created: str
    model: str
    seeds: list[int]
    n_test: int
    methods: list[str]
    tasks: list[_Task]
    notes: list[str]
    refused: list[tuple[str, str, str]]


def write(run_folder: Path) -> Summary:
    """Returns a run's summary, having written report.html, report.md, report.csv and summary.json.

    Reads config.json and records.jsonl, and where they exist routing.json and training.jsonl. Each file is
    replaced as a whole, so a kill leaves the old one or the new one.
    """
    config = _config(run_folder / "config.json")
    summary = summarise(records.read(run_folder / "records.jsonl"), config)
    values = {"conclusion": wording.conclusion(summary), **asdict(summary)}
    texts = {
        "summary.json": json.dumps(values, indent=1, ensure_ascii=False, default=_objects),
        "report.csv": table.csv(summary),
        "report.md": markdown(summary, config),
        "report.html": html(summary, config, run_folder),
    }
    for name, text in texts.items():
        save_text(run_folder / name, text)
    return summary


def html(summary: Summary, config: Mapping[str, Any], run_folder: Path) -> str:
    """Returns the page: conclusion, table, pictures and configuration; no scripts, nothing fetched."""
    ordered = sorted(
        summary.methods,
        key=lambda method: (method.name != summary.headline, method.name != BASELINE),
    )
    confused = [method.name for method in ordered if any(summary.cells(method.name).confusion)]
    return render(
        "report/templates/report.html.j2",
        _FILTERS,
        summary=summary,
        conclusion=wording.conclusion(summary),
        table=table,
        baseline=BASELINE,
        most_options=MOST_OPTIONS,
        config=config,
        pictures={
            name: _data_uri(svg) for name, svg in _pictures(summary, config, run_folder).items()
        },
        confusions={name: _data_uri(figures.confusions(summary, name)) for name in confused},
    )


def markdown(summary: Summary, config: Mapping[str, Any]) -> str:
    """Returns the conclusion, the table, its legend, what was cut short, the figures' origin, and what they cost."""
    return render(
        "report/templates/report.md.j2",
        _FILTERS,
        summary=summary,
        conclusion=wording.conclusion(summary),
        table=table,
        config=config,
    )


def _objects(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a frame as JSON has them, without what is NaN."""
    return [line.dropna().to_dict() for _, line in frame.reset_index().astype(object).iterrows()]


def _pictures(summary: Summary, config: Mapping[str, Any], run_folder: Path) -> dict[str, str]:
    """The pictures that the run has the figures for, as SVG by name."""
    pictures = {"accuracies": figures.accuracies(summary)}
    if figures.complete(summary):
        ratios = config.get("timing", {}).get("ratios", ())
        n_cached = {
            row["method"].removesuffix(", context kept"): row.get("n_cached", 0) for row in ratios
        }
        pictures["costs"] = figures.costs(summary, n_cached)
    if summary.lines.gain_n.any():
        pictures["gains"] = figures.gains(summary)
    file = run_folder / "routing.json"
    if file.exists() and (routing := load_json(file))["tasks"]:
        layers, tasks = routing["layers"], routing["tasks"]
        parts = ("head_gates", "routing_vector_abs")
        mean = {part: np.mean([task[part] for task in tasks.values()], axis=0) for part in parts}
        pictures["routing"] = figures.routing(layers, {"mean over tasks": mean})
        pictures["routing_by_task"] = figures.routing(layers, tasks)
    if steps := read_lines(run_folder / "training.jsonl", dict):
        pictures["training"] = figures.training(steps)
    return pictures


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no run folder: it holds no {path.name}")
    config = load_json(path)
    shown = {name: config[name] for name in _Shown.__annotations__ if name in config}
    try:
        read(_Shown, {"notes": [], "refused": [], **shown})
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return config
