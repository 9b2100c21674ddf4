"""Progress bars: shown only where a person watches, and only for work that takes a while."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from threading import Timer
from typing import TypeVar

from rich.console import Console
from tqdm import tqdm

from icrouting.runtime.launch import is_first

T = TypeVar("T")

# Seconds; work that takes less shows no bar.
DELAY = 2.0
# Seconds between lines where no terminal shows a bar.
EVERY = 60.0


def track(
    items: Sequence[T],
    title: str,
    sizes: Sequence[int],
    unit: str,
    done: int = 0,
    told: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yields items while a bar on standard error counts their sizes.

    Args:
        items: what is yielded.
        title: stands before the bar.
        sizes: how far each item takes the bar, in units.
        unit: name of what is counted.
        done: units that an earlier run did, where the bar starts.
        told: what the bar is to say besides, asked after each item.
    """
    # `disable=None` keeps the bar away from pipes and logs, `delay` from short work.
    disable = None if is_first() else True
    bar = tqdm(
        desc=title,
        total=done + sum(sizes),
        initial=done,
        unit=f" {unit}",
        delay=DELAY,
        disable=disable,
    )
    with bar, ExitStack() as stack:
        if not bar.disable:
            # By itself, a bar waits for its first item, which may take minutes.
            first_look = Timer(DELAY, bar.refresh)
            first_look.daemon = True
            first_look.start()
            stack.callback(first_look.cancel)
        for item, size in zip(items, sizes, strict=True):
            yield item
            # Here the caller is done with the item and asks for the next.
            if told is not None:
                bar.set_postfix_str(told(), refresh=False)
            bar.update(size)


def track_lines(
    items: Iterable[T],
    title: str,
    size: Callable[[T], int],
    unit: str,
    total: int,
    done: int = 0,
) -> Iterator[T]:
    """Yields items, and says how far it has come: by a bar, off a terminal by a line a minute.

    Args:
        items: what is yielded.
        title: stands before the bar or the line.
        size: how far an item takes it, in units.
        unit: name of what is counted.
        total: units of the whole work.
        done: units that an earlier run did.
    """
    bar = tqdm(desc=title, total=total, initial=done, unit=f" {unit}", delay=DELAY, disable=None)
    started = time.monotonic()
    said_at = started
    n_now = 0
    with bar:
        for item in items:
            yield item
            n_now += size(item)
            bar.update(size(item))
            now = time.monotonic()
            if bar.disable and now - said_at >= EVERY:
                said_at = now
                rate = n_now / (now - started)
                left = (total - done - n_now) / rate
                print(
                    f"{title}: {done + n_now:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, "
                    f"{timedelta(seconds=round(left))} left",
                    file=sys.stderr,
                    flush=True,
                )


def spinner(title: str) -> AbstractContextManager[object]:
    """Shows, on standard error, that one long step without parts is under way."""
    console = Console(stderr=True, quiet=not is_first())
    return console.status(title)
