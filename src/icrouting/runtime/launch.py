"""Launch: whether this process was started beside others, as is known without torch.

Torch takes seconds to import, and a user's mistake in a file needs none of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# What accelerate reads the number or the place of a process from. Started by hand, it has none.
_PLACES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)


def is_alone() -> bool:
    """Returns whether this process was started by hand, and not beside others."""
    return not any(name in os.environ for name in _PLACES)


def is_first() -> bool:
    """Returns what `processes.is_first` does, at once where this process is alone."""
    if is_alone():
        return True
    from icrouting.runtime import processes

    return processes.is_first()


@contextmanager
def first_one_first() -> Iterator[None]:
    """Does what `processes.first_one_first` does, at once where this process is alone."""
    if is_alone():
        yield
        return
    from icrouting.runtime import processes

    with processes.first_one_first():
        yield
