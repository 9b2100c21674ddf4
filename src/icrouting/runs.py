"""A run: a folder with its configuration, its records and the report made from them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icrouting.routed import Routed
from icrouting.storage import load_json, save_json
from icrouting.tasks import Task

# What makes two runs the same measurement; the rest of a configuration may differ on resuming.
_FIXED = (
    "model",
    "fingerprint",
    "data",
    "rows",
    "tasks",
    "sources",
    "demos_per_class",
    "demos_per_source",
    "i2cl_epochs",
)


@dataclass(frozen=True)
class RunConfig:
    """What a run measures.

    `data` says where the tasks' rows come from and `rows` is their digest; `router` is the router's; `tasks` has
    name, group, role ("source" or "unseen") and number of options of each; `seeds` are those of demonstrations and
    fits, `notes` say what was cut short and are shown beside the table.
    """

    model: str
    fingerprint: str
    data: str
    rows: str
    router: str | None
    methods: list[str]
    tasks: list[dict[str, Any]]
    sources: list[str]
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

    Methods, with the router of one, seeds and test items may be added to a run; their records join the others.
    """
    settings = json.loads(json.dumps(asdict(config)))
    file = folder / "config.json"
    if file.exists():
        found = load_json(file)
        different = [key for key in _FIXED if found.get(key, settings[key]) != settings[key]]
        routers = {found["router"], settings["router"]} - {None}
        different += ["router"] if len(routers) > 1 else []
        different += ["n_test"] if settings["n_test"] < found["n_test"] else []
        if different:
            changes = "; ".join(f"{key} was {_short(found.get(key))}, is {_short(settings[key])}" for key in different)
            raise ValueError(f"{folder} holds another run ({changes}): choose another folder with --out")
        joined = {key: list(dict.fromkeys([*found[key], *settings[key]])) for key in ("methods", "seeds")}
        command = found["command"] if _command() in found["command"] else f"{found['command']} && {_command()}"
        now = {"n_test": settings["n_test"], "notes": settings["notes"], "router": next(iter(routers), None)}
        settings = {**settings, **found, **joined, **now, "command": command}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings |= {
            "command": _command(),
            "commit": commit(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    save_json(file, {**settings, "notes": [*_cuts(settings), *settings["notes"]]})


def _cuts(settings: dict[str, Any]) -> list[str]:
    """What a run takes less of than was published."""
    n_seeds, n_test, epochs = len(settings["seeds"]), settings["n_test"], settings["i2cl_epochs"]
    seeds = f"{n_seeds} seed{'s' * (n_seeds > 1)}, {n_test} test items a task at most (paper: 3, 500)."
    i2cl = f"I2CL is calibrated for {epochs} epochs (published: 100)."
    is_i2cl_cut = epochs < 100 and any("i2cl" in method for method in settings["methods"])
    return [*([seeds] if n_seeds < 3 or n_test < 500 else []), *([i2cl] if is_i2cl_cut else [])]


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _short(value: object) -> str:
    return (text := json.dumps(value))[:77] + "..." * (len(text) > 77)


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


def routing_summary(routed: Routed, layers: Sequence[int], tasks: Sequence[Task], n_items: int = 50) -> dict[str, Any]:
    """Returns what a router decides on each task: its mean head gates and mean |alpha|, for the report."""
    found = {}
    for task in tasks:
        routing = routed.routing([task.prompt(example) for example in task.test[:n_items]])
        found[task.name] = {
            "head_gates": routing.head_gates.mean(0).tolist(),
            "routing_vector_abs": routing.routing_vector.abs().mean(0).tolist(),
        }
    return {"layers": list(layers), "tasks": found}
