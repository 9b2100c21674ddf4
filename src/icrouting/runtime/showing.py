"""Showing: values in short, for what a notebook or an error shows of them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

# Characters of a text, and items of a list, that are shown.
N_CHARACTERS = 60
N_ITEMS = 6

Shown = TypeVar("Shown", str, Sequence[str])


def in_short(value: Shown) -> Shown | str:
    """Returns a text cut to its beginning, or a list as text: its first items and their number."""
    if isinstance(value, str):
        is_long = len(value) > N_CHARACTERS
        return f"{value[:N_CHARACTERS]} ..." if is_long else value
    items = [repr(in_short(item)) for item in value[:N_ITEMS]]
    if len(value) > N_ITEMS:
        items.append(f"... {len(value)} in all")
    return f"({', '.join(items)})"


def changed(values: Any) -> str:
    """Returns a dataclass as the call that makes it: only what differs from the defaults."""
    usual = type(values)()
    parts = []
    for each in fields(values):
        value = getattr(values, each.name)
        if value != getattr(usual, each.name):
            parts.append(f"{each.name}={value!r}")
    return f"{type(values).__name__}({', '.join(parts)})"


def in_full(values: Any) -> str:
    """Returns a dataclass with all of its fields, as one without a `__repr__` of its own is shown.

    For what is held against it later: what `repr` shows may change.
    """
    parts = [f"{each.name}={getattr(values, each.name)!r}" for each in fields(values)]
    return f"{type(values).__name__}({', '.join(parts)})"


def ranges(numbers: Sequence[int]) -> str:
    """Returns numbers in short, those that follow one another as a range: "3, 20-29"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = []
    for part in parts:
        first, last = part[0], part[-1]
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(texts)
