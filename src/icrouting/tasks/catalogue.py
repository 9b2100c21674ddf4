"""The known tasks, read from catalogue.toml: the paper's twelve (table 6) and two far ones."""

import tomllib
from importlib import resources

from icrouting.tasks.task import TaskSpec

_TABLE = resources.files("icrouting.tasks").joinpath("catalogue.toml").read_text(encoding="utf-8")
_ENTRIES = tomllib.loads(_TABLE)


def _spec(name: str) -> TaskSpec:
    entry = _ENTRIES[name]
    options = tuple(entry.get("options", ()))
    return TaskSpec(name, entry["group"], entry["template"], options, entry.get("words", {}))


SPECS = {name: _spec(name) for name in _ENTRIES}
# The two that come after them are those of the offline demo.
PAPER_TASKS = tuple(SPECS)[:12]
# Where the hub and the pinned wheel have a task's rows, see catalogue.toml.
HUB = {name: entry["hub"] for name, entry in _ENTRIES.items() if "hub" in entry}
STAICC = {name: entry["staicc"] for name, entry in _ENTRIES.items() if "staicc" in entry}
# How many rows are taken of them at most.
MAX_TRAIN = {name: entry.get("max_train", 6000) for name, entry in _ENTRIES.items()}
MAX_TEST = 2000
# The tasks whose test rows a task's training rows must not repeat.
APART_FROM = {name: entry.get("apart_from", ()) for name, entry in _ENTRIES.items()}
