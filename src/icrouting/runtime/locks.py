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
    """Inside, a folder, made if need be, is that run's whose processes have all come here; ValueError if another's."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with first_one_first():
            own = folder / f"lock.{here().process_index}"
            stack.enter_context(_held(own))
            if is_first():
                for left in {*folder.glob("lock.*")} - {
                    own
                }:  # a process may have outlived the first of its run
                    with _held(left):
                        pass
        yield


def _held(file: Path) -> AbstractContextManager[object]:
    """Takes a file until the end of the context; the system frees it too when the process ends, however it ends."""
    try:
        return FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another run is writing to {file.parent}: wait for it, or choose another folder"
        ) from error
    except (
        NotImplementedError,
        OSError,
    ) as error:  # how filelock 3, and the system, say that there are no locks
        log.warning("%s: cannot be locked against other runs (%s)", file, error)
        return nullcontext()
