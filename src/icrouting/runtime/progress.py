"""Progress bars, in one place: shown only where a person watches, and only for work that takes a while."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console
from tqdm import tqdm

from icrouting.runtime.processes import is_first

T = TypeVar("T")


def track(
    items: Sequence[T], title: str, sizes: Sequence[int], unit: str, done: int = 0
) -> Iterator[T]:
    """Yields items while a bar on standard error counts their sizes, from the `done` of an earlier run on."""
    # `delay` keeps the bar away from work under two seconds, `disable=None` from pipes and logs.
    hidden = None if is_first() else True
    with tqdm(
        desc=title, total=done + sum(sizes), initial=done, unit=f" {unit}", delay=2, disable=hidden
    ) as bar:
        for item, size in zip(items, sizes, strict=True):
            yield item
            bar.update(size)


def spinner(title: str) -> AbstractContextManager[object]:
    """Shows, on standard error, that one long step without parts is under way."""
    return Console(stderr=True, quiet=not is_first()).status(title)
