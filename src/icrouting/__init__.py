"""Implicit in-context learning by routing attention (In-Context Routing, arXiv 2509.22854).

The public names are imported when first used, so that `import icrouting` does no work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icrouting.comparing.comparison import compare
    from icrouting.config import PAPER, FitConfig
    from icrouting.decoder.loading import load_model
    from icrouting.decoder.scoring import score_options
    from icrouting.icr import InContextRouter
    from icrouting.tasks.load import load_task
    from icrouting.tasks.task import Example, Task, TaskSpec

    __version__: str

# Which room each public name is imported from.
_ROOMS = {
    "PAPER": "config",
    "Example": "tasks.task",
    "FitConfig": "config",
    "InContextRouter": "icr",
    "Task": "tasks.task",
    "TaskSpec": "tasks.task",
    "compare": "comparing.comparison",
    "load_model": "decoder.loading",
    "load_task": "tasks.load",
    "score_options": "decoder.scoring",
}

__all__ = [
    "PAPER",
    "Example",
    "FitConfig",
    "InContextRouter",
    "Task",
    "TaskSpec",
    "compare",
    "load_model",
    "load_task",
    "score_options",
]


def __dir__() -> list[str]:
    """The public names, which are not imported yet when a notebook asks what there is."""
    return sorted([*__all__, *globals()])


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("icrouting")
    if name not in __all__:
        raise AttributeError(f"module 'icrouting' has no attribute {name!r}")
    # Here and not above: torch and transformers alone take seconds.
    room = import_module(f"icrouting.{_ROOMS[name]}")
    return getattr(room, name)
