"""A run: a folder with its configuration, its records and the report made from them."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from icrouting.evaluation import records
from icrouting.methods.settings import Settings
from icrouting.runtime.checks import check
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import agree, first_one_first, is_first
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.task import Task

# What a run may take more of when it is resumed; all else makes it the same measurement.
_GROWING = ("methods", "seeds", "n_test", "router", "notes")


@dataclass(frozen=True)
class RunConfig:
    """What a run measures.

    `data` says where the tasks' rows come from and `rows` is their digest, `router` is the router's; `dtype` is the
    weights'; `tasks` has name, group, role ("source" or "unseen") and number of options of each; `seeds` are those of
    demonstrations and fits, `settings` those of the methods, `notes` say what was cut short, beside the table.
    """

    model: str
    fingerprint: str
    dtype: str
    data: str
    rows: str
    router: str | None
    methods: list[str]
    tasks: Annotated[list[dict[str, Any]], Field(min_length=1)]
    sources: list[str]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    n_test: PositiveInt
    settings: Settings
    notes: list[str]

    def __post_init__(self):
        check(self)

    def flat(self) -> dict[str, Any]:
        """The content of config.json, with the methods' settings beside the others."""
        values = asdict(self)
        return {**values.pop("settings"), **values}


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


@contextmanager
def claimed(folder: Path, config: RunConfig) -> Iterator[None]:
    """Inside, a folder is one run's alone, made or taken up where all processes, however many, left it."""
    agree(**config.flat())
    with locked(folder):
        with first_one_first():
            if is_first():
                claim(folder, config)
                records.gather(folder / "records.jsonl")
        yield


def claim(folder: Path, config: RunConfig) -> None:
    """Writes a run's configuration, or checks that the run begun in the folder measures the same.

    Methods, with the router of one, seeds and test items may be added to a run; their records join the others.
    """
    file, settings = folder / "config.json", config.flat()
    begun = {
        "command": _command(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    found = load_json(file) if file.exists() else {**settings, **begun}
    if missing := {"command", *_GROWING} - found.keys():
        raise ValueError(
            f"{file} is no run's, it lacks {', '.join(sorted(missing))}: choose another folder with --out"
        )
    routers = {found["router"], settings["router"]} - {None}
    different = [
        key
        for key in settings
        if key not in _GROWING and found.get(key, settings[key]) != settings[key]
    ]
    with_no_router = (
        settings if settings["router"] is None else found
    )  # whose controls of ICR have the defaults
    is_mixed = len({found["router"], settings["router"]}) > 1 and any(
        "icr-" in m for m in with_no_router["methods"]
    )
    different += ["router"] if len(routers) > 1 or is_mixed else []
    different += ["n_test"] if settings["n_test"] < found["n_test"] else []
    if different:
        changes = "; ".join(
            f"{key} was {_short(found.get(key))}, is {_short(settings[key])}" for key in different
        )
        raise ValueError(
            f"{folder} holds another run ({changes}): choose another folder with --out"
        )
    grown = {
        key: list(dict.fromkeys([*found[key], *settings[key]])) for key in ("methods", "seeds")
    }
    grown |= {"n_test": settings["n_test"], "router": next(iter(routers), None)}
    if _command() not in found["command"]:
        grown["command"] = f"{found['command']} && {_command()}"
    settings = {**settings, **found, **grown, "notes": settings["notes"]}
    save_json(file, {**settings, "notes": [*_cuts(settings), *settings["notes"]]})


def _cuts(settings: dict[str, Any]) -> list[str]:
    """What a run takes less of than was published, or than is usual here."""
    names, n_seeds, n_test = (
        " ".join(settings["methods"]),
        len(settings["seeds"]),
        settings["n_test"],
    )
    i2cl, epochs = settings["i2cl_epochs"], settings["train_epochs"]
    usual = {name: getattr(Settings(), name) for name in ("tries", "train_rows", "train_epochs")}
    less = [
        f"{name} {settings[name]} (usual: {most})"
        for name, most in usual.items()
        if settings[name] < most
    ]
    seeds = (
        f"{n_seeds} seed{'s' * (n_seeds > 1)}, {n_test} test items a task at most (paper: 3, 500)."
    )
    cuts = {
        seeds: n_seeds < 3 or n_test < 500,
        f"I2CL is calibrated for {i2cl} epochs (published: 100).": "i2cl" in names and i2cl < 100,
        f"Prompt tuning is trained for {epochs} epochs (published: 50).": "prompt-tuning" in names
        and epochs < 50,
        f"Methods that learn are held to less, where they would take more: {', '.join(less)}.": bool(
            less
        ),
    }
    return [text for text, is_cut in cuts.items() if is_cut]


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name.replace("__main__.py", "icr"), *sys.argv[1:]])


def _short(value: object) -> str:
    return (text := json.dumps(value))[:77] + "..." * (len(text) > 77)


def commit() -> str:
    """The commit of the working tree that runs, or "unknown" outside one."""
    here = Path(__file__)
    is_tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        subprocess.run(is_tracked, cwd=here.parent, capture_output=True, check=True)
        return subprocess.run(
            describe, cwd=here.parent, capture_output=True, check=True, text=True
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def add_to_config(folder: Path, **entries: object) -> None:
    """Adds entries to a run's configuration."""
    save_json(folder / "config.json", {**load_json(folder / "config.json"), **entries})
