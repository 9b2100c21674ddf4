"""Locks: a folder is written by one run at a time, of however many processes."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from icrouting.processes import first_one_first, here, is_first

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, a folder, made if need be, is the run's whose processes have all come here.

    Raises:
        ValueError: a process of another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with first_one_first():
            own = folder / f"lock.{here().process_index}"
            stack.enter_context(_held(own))
            if is_first():
                for left in {*folder.glob("lock.*")} - {own}:  # a process may have outlived the first of its run
                    with _held(left):
                        pass
        yield


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Inside, a file is this process's; the system frees it when the process ends, however it ends."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another run is writing to {file.parent}: wait for its end, or choose another folder"
        ) from error
    except (NotImplementedError, OSError) as error:  # some network file systems have no locks
        log.info("%s: cannot be locked against other runs (%s)", file, error)
    try:
        yield
    finally:
        lock.release()
