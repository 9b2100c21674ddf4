"""Locks: a folder is written by one run at a time, of however many processes."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from icrouting.runtime.processes import first_one_first, here, is_first

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, a folder belongs to the run whose processes have all come here.

    Args:
        folder: made if need be; each process of the run locks a file of its own in it.

    Raises:
        ValueError: another run is writing to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with first_one_first():
            my_lock = folder / f"lock.{here().process_index}"
            stack.enter_context(_held(my_lock))
            # Another process of an earlier run may have outlived its first one, and still write.
            if is_first():
                _check_free(set(folder.glob("lock.*")) - {my_lock})
        yield


def _check_free(locks: set[Path]) -> None:
    for lock in locks:
        with _held(lock):
            pass


def _held(file: Path) -> AbstractContextManager[object]:
    """Takes a file until the end of the context.

    The system frees it too when the process ends, however it ends.
    """
    try:
        return FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another run is writing to {file.parent}: wait for it, or choose another folder"
        ) from error
    # How filelock 3, and the system, say that there are no locks: no reason to stop one's work.
    except (NotImplementedError, OSError) as error:
        log.warning("%s: cannot be locked against other runs (%s)", file, error)
        return nullcontext()
