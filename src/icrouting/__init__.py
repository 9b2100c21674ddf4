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

# The lightest first.
_HOMES = ("tasks", "config", "models", "scoring", "icr")

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
    if name not in __all__:
        raise AttributeError(f"module 'icrouting' has no attribute {name!r}")
    rooms = (import_module(f"icrouting.{home}") for home in _HOMES)
    return next(getattr(room, name) for room in rooms if name in vars(room))
