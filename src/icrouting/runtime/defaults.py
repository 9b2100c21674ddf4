"""Defaults: the dtype and the device that torch gives a new tensor which names none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

# The dtype is one for the process: the first that is inside saves it, the last puts it back.
_lock = threading.Lock()
_n_inside = 0
_dtype_before = torch.float32


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Inside, new tensors are in float32 on the processor, unless they are asked for otherwise.

    Users may have set other defaults, for models of their own, and get them back on leaving. It is
    a decorator too.
    """
    is_usual_device = torch.get_default_device().type == "cpu"
    # Only where it is another one: torch looks at every call while a device is set.
    placed = nullcontext() if is_usual_device else torch.device("cpu")
    _enter()
    try:
        with placed:
            yield
    finally:
        _leave()


def _enter() -> None:
    global _n_inside, _dtype_before
    with _lock:
        if _n_inside == 0:
            _dtype_before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _n_inside += 1


def _leave() -> None:
    global _n_inside
    with _lock:
        _n_inside -= 1
        if _n_inside == 0:
            torch.set_default_dtype(_dtype_before)
