"""Report: a run folder's figures as one HTML page that needs nothing else, beside Markdown, CSV and JSON."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from icrouting import conclusion, figures, records, table
from icrouting.storage import load_json, save_text
from icrouting.summary import BASELINE, Summary
from icrouting.table import csv, markdown, terminal_table
from icrouting.tally import summarise

__all__ = ["Extras", "csv", "html", "markdown", "summarise", "terminal_table", "write"]

CONFIG_KEYS = ("command", "commit", "created", "model", "seeds", "n_test", "methods", "tasks")
SHOWN_ELSEWHERE = ("command", "notes", "refused", "tasks", "timing")


@dataclass(frozen=True)
class Extras:
    """What a run folder may hold besides its records: what the router decides, numbers kept, training steps."""

    routing: Mapping[str, Any] | None
    n_cached: Mapping[str, int]
    training: Sequence[Mapping[str, Any]]


def write(run_folder: Path) -> Summary:
    """Returns a run's summary, having written report.html, report.md, report.csv and summary.json.

    Reads config.json and records.jsonl, and where they exist routing.json and training.jsonl. Each file is
    replaced as a whole, so a kill leaves the old one or the new one.
    """
    config = _config(run_folder / "config.json")
    summary = summarise(records.read(run_folder / "records.jsonl"), config)
    routing_path = run_folder / "routing.json"
    rows = records.read_lines(run_folder / "training.jsonl", dict)
    ratios = config.get("timing", {}).get("ratios", ())
    n_cached = {row["method"].removesuffix(", context kept"): row.get("n_cached", 0) for row in ratios}
    extras = Extras(load_json(routing_path) if routing_path.exists() else None, n_cached, rows)
    values = {"conclusion": conclusion.conclusion(summary), **asdict(summary)}
    texts = {
        "summary.json": json.dumps(values, indent=1, ensure_ascii=False, default=_objects),
        "report.csv": csv(summary),
        "report.md": markdown(summary),
        "report.html": html(summary, config, extras),
    }
    for name, text in texts.items():
        save_text(run_folder / name, text)
    return summary


def html(summary: Summary, config: Mapping[str, Any], extras: Extras) -> str:
    """Returns the page: conclusion, table, pictures and configuration; no scripts, nothing fetched."""
    return render(
        "report.html.j2",
        summary=summary,
        conclusion=conclusion.conclusion(summary),
        marks=table.marks,
        collapse=table.collapse,
        legend=table.LEGEND,
        baseline=BASELINE,
        config=config,
        settings={key: _shown(config[key]) for key in config if key not in SHOWN_ELSEWHERE},
        tasks={task["name"]: _shown({k: task[k] for k in task if k != "name"}) for task in config["tasks"]},
        timing=config.get("timing"),
        pictures={name: _data_uri(svg) for name, svg in _pictures(summary, extras).items()},
        confusions=_confusions(summary),
        options={task["name"]: task["options"] for task in config["tasks"] if task.get("options")},
    )


def render(template: str, **values: object) -> str:
    """Returns a page: one of our templates filled with values, which are escaped."""
    texts = resources.files("icrouting")
    loader = jinja2.FunctionLoader(lambda name: texts.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    environment.filters.update(points=conclusion.points, label=conclusion.label)
    return environment.get_template(template).render(**values)


def _objects(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a frame as JSON has them, without what is NaN."""
    return [line.dropna().to_dict() for _, line in frame.reset_index().astype(object).iterrows()]


def _confusions(summary: Summary) -> dict[str, str]:
    """Confusion matrices by method: the method in question, the baseline, the others."""
    ordered = sorted(summary.methods, key=lambda method: (method.name != summary.headline, method.name != BASELINE))
    return {method.name: _data_uri(figures.confusions(summary, method.name)) for method in ordered}


def _pictures(summary: Summary, extras: Extras) -> dict[str, str]:
    """The pictures that the run has the figures for, as SVG by name."""
    pictures = {"accuracies": figures.accuracies(summary)}
    if figures.complete(summary):
        pictures["costs"] = figures.costs(summary, extras.n_cached)
    if summary.lines.gain_n.any():
        pictures["gains"] = figures.gains(summary)
    if extras.routing and extras.routing["tasks"]:
        layers, tasks = extras.routing["layers"], extras.routing["tasks"]
        parts = ("head_gates", "routing_vector_abs")
        mean = {part: np.mean([task[part] for task in tasks.values()], axis=0) for part in parts}
        pictures["routing"] = figures.routing(layers, {"mean over tasks": mean})
        pictures["routing_by_task"] = figures.routing(layers, tasks)
    if extras.training:
        pictures["training"] = figures.training(extras.training)
    return pictures


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _shown(value: object) -> str:
    """A configuration value in words; nested ones stay JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no run folder: it holds no {path.name}")
    config = load_json(path)
    if missing := [key for key in CONFIG_KEYS if key not in config]:
        raise ValueError(f"{path}: expected the keys {list(CONFIG_KEYS)}, missing {missing}")
    return config
