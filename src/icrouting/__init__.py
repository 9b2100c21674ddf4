"""Implicit in-context learning by routing attention (In-Context Routing, arXiv 2509.22854).

The public names are imported when first used, so that `import icrouting` does no work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icrouting.config import PAPER, FitConfig
    from icrouting.icr import InContextRouter
    from icrouting.models import load_model
    from icrouting.scoring import score_options
    from icrouting.tasks import Example, Task, TaskSpec, load_task

_HOMES = {
    "PAPER": "config",
    "FitConfig": "config",
    "InContextRouter": "icr",
    "load_model": "models",
    "score_options": "scoring",
    "Example": "tasks",
    "Task": "tasks",
    "TaskSpec": "tasks",
    "load_task": "tasks",
}

__all__ = [
    "PAPER",
    "Example",
    "FitConfig",
    "InContextRouter",
    "Task",
    "TaskSpec",
    "load_model",
    "load_task",
    "score_options",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'icrouting' has no attribute {name!r}")
    return getattr(import_module(f"icrouting.{_HOMES[name]}"), name)
