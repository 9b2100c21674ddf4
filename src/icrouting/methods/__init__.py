"""Methods: ICR and its rivals, one file each. The names below are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icrouting.methods.base import Method
    from icrouting.methods.registry import METHODS, make
    from icrouting.methods.settings import Settings

# By name the module that defines it: the registry imports every method, and torch with them.
_ROOMS = {
    "LEARNING": "registry",
    "METHODS": "registry",
    "Method": "base",
    "Settings": "settings",
    "make": "registry",
}

__all__ = ["METHODS", "Method", "Settings", "make"]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module 'icrouting.methods' has no attribute {name!r}")
    room = import_module(f"icrouting.methods.{_ROOMS[name]}")
    return getattr(room, name)
