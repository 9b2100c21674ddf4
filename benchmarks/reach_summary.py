"""The figures in one table: see `benchmarks.reach`."""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.reach_training import VARIANTS, loss_of
from icrouting.report.calibrated import without_prior

KEYS = ["model", "task", "variant", "steps"]
N_BOOTSTRAP = 10_000


def records_of(file: Path) -> list[dict]:
    """Returns what has been measured."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def padded(rows: list[list[float]]) -> np.ndarray:
    """Returns rows of scores as one array, filled with -inf."""
    scores = np.full((len(rows), max(map(len, rows))), -np.inf)
    for place, row in enumerate(rows):
        scores[place, : len(row)] = row
    return scores


def rights(record: dict, step: str) -> dict[str, np.ndarray]:
    """Returns which test rows were answered rightly at a look, raw and calibrated."""
    scores = padded(record["looks"][step]["test"])
    labels = np.array(record["labels"]["test"])
    return {
        "raw": scores.argmax(1) == labels,
        "calibrated": without_prior(scores).argmax(1) == labels,
    }


def last_look(record: dict) -> str:
    """Returns the last look's step."""
    return max(record["looks"], key=int)


def best_look(record: dict) -> str:
    """Returns the step of the look with the least loss on the rows apart, of the kind trained."""
    variant = VARIANTS[record["variant"]]
    losses = {}
    for step, look in record["looks"].items():
        scores = torch.from_numpy(padded(look["held"]))
        is_taken = variant.prior == "taken"
        losses[step] = loss_of(scores, record["labels"]["held"], is_taken=is_taken)
    return min(losses, key=lambda step: losses[step])


def interval(differences: list[np.ndarray]) -> str:
    """Returns a mean over tasks in points, with a bootstrap interval over the items of each."""
    rng = np.random.default_rng(0)
    draws = np.zeros(N_BOOTSTRAP)
    for of_task in differences:
        places = rng.integers(len(of_task), size=(N_BOOTSTRAP, len(of_task)))
        draws += of_task[places].mean(1) / len(differences)
    low, high = 100 * np.quantile(draws, [0.025, 0.975])
    mean = 100 * np.mean([of_task.mean() for of_task in differences])
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


def summarise(file: Path) -> None:
    """Prints a table for each model: accuracy by variant and task, raw / calibrated."""
    by_key = {tuple(record[key] for key in KEYS): record for record in records_of(file)}
    for model in dict.fromkeys(key[0] for key in by_key):
        records = [record for key, record in by_key.items() if key[0] == model]
        print(f"\n{model}: raw / calibrated accuracy; differences are to calibrated zero-shot\n")
        _table(records)


def _table(records: list[dict]) -> None:
    tasks = list(dict.fromkeys(record["task"] for record in records))
    head = ["variant", "steps", *tasks, "mean", "raw - 0-shot cal.", "cal. - 0-shot cal."]
    head += ["test loss", "s a fit"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    zero_shot = {
        record["task"]: rights(record, "0")["calibrated"]
        for record in records
        if record["variant"] == "zero-shot"
    }
    for variant, n_steps in dict.fromkeys((each["variant"], each["steps"]) for each in records):
        of_task = {
            each["task"]: each
            for each in records
            if (each["variant"], each["steps"]) == (variant, n_steps)
        }
        ways = {"": last_look}
        if variant in VARIANTS:
            ways[", stopped"] = best_look
        for way, look_of in ways.items():
            looks = {task: look_of(record) for task, record in of_task.items()}
            line = _cells(of_task, looks, tasks, zero_shot)
            at_steps = np.mean([int(step) for step in looks.values()])
            print(f"| {variant}{way} | {at_steps:.0f} of {n_steps} | " + " | ".join(line) + " |")


def _cells(
    of_task: dict[str, dict], looks: dict[str, str], tasks: list[str], zero_shot: dict
) -> list[str]:
    """Returns a line's cells: each task's accuracies, their means, and what they gain."""
    answered = {task: rights(of_task[task], looks[task]) for task in of_task}
    cells = []
    for task in tasks:
        if task not in answered:
            cells.append("")
            continue
        figures = [100 * answered[task][kind].mean() for kind in ("raw", "calibrated")]
        cells.append(f"{figures[0]:.1f} / {figures[1]:.1f}")
    means = []
    gains = []
    for kind in ("raw", "calibrated"):
        means.append(100 * np.mean([each[kind].mean() for each in answered.values()]))
        differences = [
            each[kind].astype(float) - zero_shot[task] for task, each in answered.items()
        ]
        gains.append(interval(differences))
    missing = "" if len(answered) == len(tasks) else f" ({len(answered)} tasks)"
    losses = []
    for task, record in of_task.items():
        scores = torch.from_numpy(padded(record["looks"][looks[task]]["test"]))
        losses.append(loss_of(scores, record["labels"]["test"]))
    stages = ("preparing", "training", "looking")
    seconds = [
        sum(each.get(f"seconds_{stage}", 0) for stage in stages) for each in of_task.values()
    ]
    cells += [f"{means[0]:.1f} / {means[1]:.1f}{missing}", *gains]
    return [*cells, f"{np.mean(losses):.3f}", f"{np.mean(seconds):.0f}"]
