"""The known tasks, read from catalogue.toml: the paper's twelve (table 6) and two far tasks of the offline demo."""

import tomllib
from importlib import resources

from icrouting.tasks.task import TaskSpec

_ENTRIES = tomllib.loads(
    resources.files("icrouting.tasks").joinpath("catalogue.toml").read_text(encoding="utf-8")
)

SPECS = {
    name: TaskSpec(
        name,
        entry["group"],
        entry["template"],
        tuple(entry.get("options", ())),
        entry.get("words", {}),
    )
    for name, entry in _ENTRIES.items()
}
PAPER_TASKS = tuple(SPECS)[:12]
# Where the hub and the pinned wheel have a task's rows, see catalogue.toml, and how many of them are taken at most.
HUB = {name: entry["hub"] for name, entry in _ENTRIES.items() if "hub" in entry}
STAICC = {name: entry["staicc"] for name, entry in _ENTRIES.items() if "staicc" in entry}
MAX_TRAIN = {name: entry.get("max_train", 6000) for name, entry in _ENTRIES.items()}
MAX_TEST = 2000
APART_FROM = {name: entry.get("apart_from", ()) for name, entry in _ENTRIES.items()}
