"""A run: a folder with its configuration, its records and the report made from them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icrouting.icr import InContextRouter
from icrouting.storage import load_json, save_json
from icrouting.tasks import Task

# What makes two runs the same measurement; the rest of a configuration may differ on resuming.
_FIXED = ("model", "data", "rows", "tasks", "demos_per_class", "demos_per_source", "i2cl_epochs", "router")


@dataclass(frozen=True)
class RunConfig:
    """What a run measures.

    `data` says where the tasks' rows come from and `rows` is their digest; `router` is the router's; `tasks` has
    name, group, role ("source" or "unseen") and number of options of each; `seeds` are those of demonstrations and
    fits, `notes` say what was cut short and are shown beside the table.
    """

    model: str
    data: str
    rows: str
    router: str | None
    methods: list[str]
    tasks: list[dict[str, Any]]
    seeds: list[int]
    n_test: int
    demos_per_class: int
    demos_per_source: int
    i2cl_epochs: int
    notes: list[str]

    def __post_init__(self):
        counts = (self.n_test, self.demos_per_class, self.demos_per_source, self.i2cl_epochs)
        if not self.tasks or not self.seeds or min(self.seeds) < 0 or min(counts) < 1:
            raise ValueError(
                "expected at least one task, one seed from 0 up, --n-test, --demos-per-class, --demos-per-source and "
                f"--i2cl-epochs from 1 up; got {len(self.tasks)} tasks, seeds {self.seeds}, {counts}"
            )


def task_entries(tasks: Sequence[Task], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a run's configuration says of its tasks."""
    return [
        {
            "name": task.name,
            "group": task.spec.group,
            "role": "source" if task.name in sources else "unseen",
            "n_options": max(len(task.options(example)) for example in task.test),
        }
        for task in tasks
    ]


def claim(folder: Path, config: RunConfig) -> None:
    """Writes a run's configuration, or checks that the run begun in the folder measures the same.

    Methods, seeds and test items may be added to a run; their records join the others.

    Raises:
        ValueError: the folder holds another measurement; the differences are named.
    """
    settings = json.loads(json.dumps(asdict(config)))
    file = folder / "config.json"
    if file.exists():
        found = load_json(file)
        different = [key for key in _FIXED if found.get(key) != settings[key]]
        different += ["n_test"] if settings["n_test"] < found["n_test"] else []
        if different:
            changes = "; ".join(f"{key} was {_short(found.get(key))}, is {_short(settings[key])}" for key in different)
            raise ValueError(f"{folder} holds another run ({changes}): choose another folder with --out")
        joined = {key: list(dict.fromkeys([*found[key], *settings[key]])) for key in ("methods", "seeds")}
        settings = {**found, **joined, **{key: settings[key] for key in ("n_test", "notes")}}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings |= {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": commit(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    save_json(file, settings)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def commit() -> str:
    """The commit of the working tree that runs, or "unknown" outside one."""
    here = Path(__file__)
    is_tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        for command in (is_tracked, describe):
            done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True)
            if done.returncode:
                return "unknown"
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip()


def add_to_config(folder: Path, **entries: object) -> None:
    """Adds entries to a run's configuration."""
    save_json(folder / "config.json", {**load_json(folder / "config.json"), **entries})


def routing_summary(icr: InContextRouter, tasks: Sequence[Task], n_items: int = 50) -> dict[str, Any]:
    """Returns what a router decides on each task: its mean head gates and mean |alpha|, for the report."""
    found = {}
    for task in tasks:
        routing = icr.routing([task.prompt(example) for example in task.test[:n_items]])
        found[task.name] = {
            "head_gates": routing.head_gates.mean(0).tolist(),
            "routing_vector_abs": routing.routing_vector.abs().mean(0).tolist(),
        }
    return {"layers": list(icr.pids.layers), "tasks": found}
