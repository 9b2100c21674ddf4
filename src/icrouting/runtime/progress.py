"""Progress bars: shown only where a person watches, and only for work that takes a while."""

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
    """Yields items while a bar on standard error counts their sizes.

    Args:
        items: what is yielded.
        title: stands before the bar.
        sizes: how far each item takes the bar, in units.
        unit: name of what is counted.
        done: units that an earlier run did, where the bar starts.
    """
    # `disable=None` keeps the bar away from pipes and logs, `delay` from work under two seconds.
    disable = None if is_first() else True
    bar = tqdm(
        desc=title,
        total=done + sum(sizes),
        initial=done,
        unit=f" {unit}",
        delay=2,
        disable=disable,
    )
    with bar:
        for item, size in zip(items, sizes, strict=True):
            yield item
            # Here the caller is done with the item and asks for the next.
            bar.update(size)


def spinner(title: str) -> AbstractContextManager[object]:
    """Shows, on standard error, that one long step without parts is under way."""
    console = Console(stderr=True, quiet=not is_first())
    return console.status(title)
