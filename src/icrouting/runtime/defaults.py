"""Defaults: the dtype and the device that torch gives a new tensor which names none."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Inside, new tensors are in float32 on the processor, unless they are asked for otherwise.

    Users may have set other defaults, for models of their own, and get them back on leaving. It is
    a decorator too.
    """
    dtype = torch.get_default_dtype()
    is_usual_device = torch.get_default_device().type == "cpu"
    # Only where it is another one: torch looks at every call while a device is set.
    placed = nullcontext() if is_usual_device else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with placed:
            yield
    finally:
        torch.set_default_dtype(dtype)
