"""The methods under test: what they are called and how they are made. A new one is a file and a line here."""

from collections.abc import Callable, Sequence

from icrouting.methods.base import Method, Settings
from icrouting.methods.prompting import FewShot, ZeroShot
from icrouting.methods.routing import Icr
from icrouting.tasks import near_matches

METHODS: dict[str, Callable[[Settings], Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShot,
    "icr": Icr,
}


def make(names: Sequence[str], settings: Settings) -> list[Method]:
    """Returns methods by name; ValueError with near matches on an unknown one."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}: {near_matches(name, list(METHODS))}")
    return [METHODS[name](settings) for name in dict.fromkeys(names)]


__all__ = ["METHODS", "Method", "Settings", "make"]
