"""Locks: a folder is written by one run at a time, of however many processes."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from icrouting.runtime.processes import first_one_first, here, is_first

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, *, is_patient: bool = False) -> Iterator[None]:
    """Inside, a folder belongs to the run whose processes have all come here.

    Args:
        folder: made if need be; each process of the run locks a file of its own in it.
        is_patient: whether to wait for another run that is writing to the folder.

    Raises:
        ValueError: another run is writing to the folder, and it is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with first_one_first():
            my_lock = folder / f"lock.{here().process_index}"
            stack.enter_context(_held(my_lock, is_patient))
            # Another process of an earlier run may have outlived its first one, and still write.
            if is_first():
                _check_free(set(folder.glob("lock.*")) - {my_lock}, is_patient)
        yield


def _check_free(locks: set[Path], is_patient: bool) -> None:
    for lock in locks:
        with _held(lock, is_patient):
            pass


def _held(file: Path, is_patient: bool) -> AbstractContextManager[object]:
    """Takes a file until the end of the context.

    The system frees it too when the process ends, however it ends.
    """
    try:
        return FileLock(file).acquire(timeout=0)
    except Timeout as error:
        if is_patient:
            log.warning("another run is writing to %s: waiting for it", file.parent)
            return FileLock(file).acquire(timeout=-1)
        raise ValueError(
            f"another run is writing to {file.parent}: wait for it, or choose another folder"
        ) from error
    # How filelock 3, and the system, say that there are no locks: no reason to stop one's work.
    except (NotImplementedError, OSError) as error:
        log.warning("%s: cannot be locked against other runs (%s)", file, error)
        return nullcontext()
